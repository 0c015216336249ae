"""How a host model is described: its blocks as lists of residual branches."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastcache.errors import HostError
from fastcache.plan.layout import Layout


@dataclass(frozen=True)
class HostBranch:
    """x <- x + gate * body(norm(x) * (1 + scale) + shift), as one block of the host has it.

    name, norm_name: the block's attributes that hold the body, [B, N, D] -> [B, N, D], and its norm.
    The modules are looked up when they are used, so those of now run, with weights of now. shift,
    scale, gate: rows of the block's modulation [B, V, D], None where the host has none. attention: the
    body is the block's self-attention, from which tokens get their scores.
    """

    block: nn.Module
    name: str
    norm_name: str
    shift: int | None
    scale: int | None
    gate: int | None
    attention: bool = False

    @property
    def body(self) -> nn.Module:
        """The host's submodule that computes the feature."""
        return getattr(self.block, self.name)

    @property
    def norm(self) -> nn.Module:
        """The host's submodule that normalises the stream before it is modulated."""
        return getattr(self.block, self.norm_name)


@dataclass(frozen=True)
class GateProjection:
    """A block's modulation where it is a plain Linear after an activation: `width` rows a vector, gates among
    them.
    """

    activation: Callable[[Tensor], Tensor]
    linear: nn.Linear
    gates: tuple[int, ...]  # vectors that are gates, one per branch that has one
    width: int

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of vectors first .. last - 1, views of the host's own."""
        rows = slice(first * self.width, last * self.width)
        return self.linear.weight[rows], None if self.linear.bias is None else self.linear.bias[rows]


class Host(abc.ABC):
    """Adapter of one model family. Recognises by structure; calls the host's own modules."""

    family: ClassVar[str]
    vectors: ClassVar[int]  # V: modulation vectors per block

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abc.abstractmethod
    def missing(cls, model: nn.Module) -> list[str]:
        """What the model lacks to be of this family; empty if it is."""

    @property
    @abc.abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Blocks in execution order."""

    @abc.abstractmethod
    def branches(self, block: nn.Module) -> tuple[HostBranch, ...]:
        """Branches of a block in execution order."""

    @abc.abstractmethod
    def layout(self, tokens: int | None = None) -> Layout:
        """The branches with their costs, for `tokens` per sample (the model's own size if None)."""

    @abc.abstractmethod
    def block_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(x [B, N, D], condition) from the arguments of a block's forward."""

    @abc.abstractmethod
    def sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The latents x [B, ...] from the arguments of the model's forward."""

    @abc.abstractmethod
    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """t from the arguments of the model's forward."""

    @abc.abstractmethod
    def modulation(self, block: nn.Module, condition: Tensor) -> Tensor:
        """[B, V, D] modulation vectors of a block, by the host's own module (a view is fine)."""

    @abc.abstractmethod
    def gates(self, block: nn.Module, condition: Tensor, memo: dict[str, Any]) -> list[Tensor | None]:
        """Gate [B, D] of every branch, computed alone where that is safe. `memo` lives one step."""

    def modulators(self) -> list[nn.Module]:
        """The modules whose weights announced modulations depend on."""
        return []

    def gate_projection(self, block: nn.Module) -> GateProjection | None:
        """How the vectors of a block are made, None if by anything but a plain projection."""
        return None

    @abc.abstractmethod
    def step_conditions(self, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Condition [S, B, D] that blocks will get at each of S timesteps, by the host's embedders."""


def linear_flops(module: nn.Module) -> int:
    """FLOPs per row of every Linear-like leaf in a module (LoRA and quantised layers included)."""
    leaves = (m for m in module.modules() if isinstance(m, nn.Linear) or not any(m.children()))
    return sum(
        2 * m.in_features * m.out_features
        for m in leaves
        if hasattr(m, "in_features") and hasattr(m, "out_features")
    )


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if a module is exactly of `kind`, with plain weights and nothing hooked to its call."""
    fields = module.__dict__
    return (
        type(module) is kind
        and "forward" not in fields
        and not any(fields.get(hooks) for hooks in HOOKS)
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and all(
            type(parameter) in (nn.Parameter, Tensor, type(None))
            for parameter in fields["_parameters"].values()
        )
    )


def unknown_model(model: nn.Module, reasons: dict[str, list[str]]) -> HostError:
    """The error for a model that no adapter recognises."""
    looked = "; ".join(f"{family} needs {', '.join(missing)}" for family, missing in reasons.items())
    return HostError(
        f"{type(model).__name__} is not a model that FastCache knows: {looked}. Write an adapter: subclass"
        " fastcache.hosts.Host (see fastcache/hosts/dit.py, 100 lines) and pass it as accelerate(...,"
        " host=MyHost), or use fastcache.ResidualStream in the model itself"
    )
