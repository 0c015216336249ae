"""The DiT family: blocks of gated self-attention and gated MLP with adaLN-Zero.

Method: docs/methods/README.md, "The host".

Recognises the original's structure whoever wrote the class: `blocks[i]` with `norm1`, `attn`,
`norm2`, `mlp` and `adaLN_modulation`, whose output holds shift, scale and gate of the attention
and then of the MLP.
"""

import inspect
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.errors import HostError, SessionError
from fastcache.hosts.base import GateProjection, Host, HostBranch, is_plain, linear_flops
from fastcache.plan.layout import Branch, Layout

BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
GATES = (2, 5)


class DiTHost(Host):
    """Adapter of DiT and models of its structure."""

    family = "DiT"
    vectors = 6

    @classmethod
    def missing(cls, model: nn.Module) -> list[str]:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            return ["a non-empty ModuleList `blocks`"]
        absent = [
            part
            for part in BLOCK_PARTS
            if any(not isinstance(getattr(block, part, None), nn.Module) for block in blocks)
        ]
        found = [f"blocks[i].{part}" for part in absent]
        if not absent and any(
            not isinstance(norm, nn.LayerNorm) for block in blocks for norm in (block.norm1, block.norm2)
        ):
            found.append("LayerNorm as blocks[i].norm1 and .norm2")
        if not isinstance(getattr(model, "final_layer", None), nn.Module):
            found.append("final_layer")
        return found

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def branches(self, block: nn.Module) -> tuple[HostBranch, ...]:
        return (
            HostBranch(block, "attn", "norm1", 0, 1, 2, attention=True),
            HostBranch(block, "mlp", "norm2", 3, 4, 5),
        )

    def layout(self, tokens: int | None = None) -> Layout:
        blocks = self.blocks
        last = _last_linear(blocks[0].adaLN_modulation)
        width = last.out_features // self.vectors
        if tokens is None:
            table = getattr(self.model, "pos_embed", None)
            tokens = table.shape[1] if isinstance(table, Tensor) else 0
        branches = tuple(
            branch
            for index, block in enumerate(blocks)
            for branch in (
                Branch(index, "attn", linear_flops(block.attn), 4 * width),
                Branch(index, "mlp", linear_flops(block.mlp)),
            )
        )
        heads = getattr(blocks[0].attn, "num_heads", getattr(blocks[0].attn, "heads", 1))
        return Layout(
            self.family,
            tokens,
            width,
            int(heads),
            branches,
            self._fixed_flops(tokens),
            linear_flops(blocks[0].adaLN_modulation),
        )

    def _fixed_flops(self, tokens: int) -> int:
        total = (
            linear_flops(self.model.final_layer.adaLN_modulation)
            if hasattr(self.model.final_layer, "adaLN_modulation")
            else 0
        )
        total += tokens * linear_flops(getattr(self.model.final_layer, "linear", nn.Identity()))
        if isinstance(getattr(self.model, "t_embedder", None), nn.Module):
            total += linear_flops(self.model.t_embedder)
        patch = next((m for m in self.model.modules() if isinstance(m, nn.Conv2d)), None)
        return total + (0 if patch is None else 2 * tokens * patch.weight.numel())

    def block_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if len(args) == 2 and not kwargs:
            x, c = args
        else:
            named = {**dict(zip(("x", "c"), args, strict=False)), **kwargs}
            if len(args) > 2 or set(named) != {"x", "c"}:
                raise HostError(
                    f"DiT block: expected forward(x, c), got {len(args)} positional arguments and"
                    f" {sorted(kwargs)}"
                )
            x, c = named["x"], named["c"]
        if not isinstance(x, Tensor) or not isinstance(c, Tensor) or x.ndim != 3 or c.ndim != 2:
            shapes = [
                list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (x, c)
            ]
            raise HostError(
                f"DiT block: expected x [B, N, D] and a condition [B, C], got {shapes[0]} and {shapes[1]}"
            )
        return x, c

    def sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._argument(args, kwargs, ("x", "sample", "hidden_states", "latents"), 0)

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._argument(args, kwargs, ("t", "timestep", "timesteps", "time"), 1)

    def _argument(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...], position: int
    ) -> Tensor:
        """An argument of the model's forward by its usual names, else by the family's position."""
        for name in names:
            if name in kwargs:
                return kwargs[name]
        place = next((place for name, place in self._positions.items() if name in names), position)
        if place >= len(args):
            raise HostError(
                f"{type(self.model).__name__}.forward: expected {names[0]} as argument {position + 1} or by"
                f" name (one of {', '.join(names)}), got {len(args)} positional arguments and"
                f" {sorted(kwargs)}"
            )
        return args[place]

    @cached_property
    def _positions(self) -> dict[str, int]:
        """Places of the forward's arguments by name, as its class declares them."""
        parameters = list(inspect.signature(type(self.model).forward).parameters)
        return {name: place for place, name in enumerate(parameters[1:])}

    def modulators(self) -> list[nn.Module]:
        embedders = [getattr(self.model, name, None) for name in ("t_embedder", "y_embedder")]
        return [block.adaLN_modulation for block in self.blocks] + [
            module for module in embedders if isinstance(module, nn.Module)
        ]

    def modulation(self, block: nn.Module, condition: Tensor) -> Tensor:
        return block.adaLN_modulation(condition).unflatten(-1, (self.vectors, -1))

    def gate_projection(self, block: nn.Module) -> GateProjection | None:
        projection = block.adaLN_modulation
        if not (
            is_plain(projection, nn.Sequential)
            and len(projection) == 2
            and is_plain(projection[0], nn.SiLU)
            and is_plain(projection[1], nn.Linear)
        ):
            return None
        return GateProjection(F.silu, projection[1], GATES, projection[1].weight.shape[0] // self.vectors)

    def gates(self, block: nn.Module, condition: Tensor, memo: dict[str, Any]) -> list[Tensor | None]:
        projection = self.gate_projection(block)
        if projection is None:
            every = self.modulation(block, condition)
            return [every[:, row] for row in GATES]
        known, activated = memo.get("silu", (None, None))
        if known is not condition:
            activated = projection.activation(condition)
            memo["silu"] = condition, activated
        return [F.linear(activated, *projection.rows(gate, gate + 1)) for gate in projection.gates]

    def step_conditions(self, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        if set(conditions) != {"y"}:
            raise SessionError(
                "conditions: a DiT is conditioned on y, expected {'y': labels [B]}, got"
                f" {sorted(conditions)}"
            )
        absent = [
            name
            for name in ("t_embedder", "y_embedder")
            if not isinstance(getattr(self.model, name, None), nn.Module)
        ]
        if absent:
            raise SessionError(
                f"conditions: this DiT has no {' and '.join(absent)}; begin without timesteps and conditions"
            )
        y = conditions["y"]
        parameter = next(self.model.parameters())
        device = y.device if parameter.is_meta else parameter.device  # an offloaded module moves what it gets
        y = y.to(device)
        # one call for all steps: [S] timesteps, then [B] labels, broadcast to [S, B, D]
        time = self.model.t_embedder(timesteps.to(device))
        label = _embed_labels(self.model.y_embedder, y)
        return time[:, None] + label[None]


def _embed_labels(embedder: nn.Module, y: Tensor) -> Tensor:
    """Labels through the host's embedder; the original's takes (labels, train)."""
    try:
        return embedder(y)
    except TypeError:
        return embedder(y, False)


def _last_linear(module: nn.Module) -> nn.Linear:
    found = [
        m
        for m in module.modules()
        if hasattr(m, "in_features") and hasattr(m, "out_features") and m.out_features % DiTHost.vectors == 0
    ]
    if not found:
        raise HostError("blocks[0].adaLN_modulation: expected a Linear with 6 x width outputs")
    return max(found, key=lambda m: m.out_features)
