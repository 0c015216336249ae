"""DiT: the class-conditional diffusion transformer with adaLN-zero blocks.

Source of the equations: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022),
section 3.2. The state dict has the DiT family's keys, so its published checkpoints load.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.models.checkpoint import Checkpoint, read_checkpoint
from fastcache.models.config import PRESETS, DiTConfig
from fastcache.models.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_positions

GUIDED_CHANNELS = 3  # the family guides the first three output channels only
EMBEDDING_STD = 0.02


class DiT(nn.Module):
    """x [B, C, S, S], t [B], y [B] -> [B, out_channels, S, S].

    Raises ValueError for sizes that do not fit together, naming the argument.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.config = DiTConfig(
            input_size,
            patch_size,
            in_channels,
            hidden_size,
            depth,
            num_heads,
            mlp_ratio,
            num_classes,
            learn_sigma,
        )
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, self.config.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.config.out_channels)
        self._initialise()

    @classmethod
    def from_config(cls, config: DiTConfig) -> "DiT":
        """The model that `config` describes, freshly initialised."""
        return cls(**asdict(config))

    @classmethod
    def preset(
        cls,
        name: str,
        input_size: int = 32,
        *,
        in_channels: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> "DiT":
        """A published size, freshly initialised: `DiT.preset("DiT-XL/2")` is the 256 px ImageNet model.

        Raises ValueError if `name` is not one of `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        size = PRESETS[name]
        return cls(
            input_size,
            size.patch_size,
            in_channels,
            size.hidden_size,
            size.depth,
            size.num_heads,
            mlp_ratio,
            num_classes,
            learn_sigma,
        )

    @staticmethod
    def from_checkpoint(path: str | Path, *, num_heads: int | None = None) -> "DiT":
        """The model stored in a family `.pt` file or a `.safetensors` file, in float32 and eval mode.

        The configuration comes from the file's `config` metadata, else from the shapes. Shapes do not
        tell the number of heads: it is looked up in `PRESETS`, or given here for other sizes.
        Errors: see `fastcache.models.checkpoint.read_checkpoint`.
        """
        return DiT.from_stored(read_checkpoint(path, num_heads=num_heads))

    @staticmethod
    def from_stored(checkpoint: Checkpoint) -> "DiT":
        """The model that a checkpoint holds, in float32 and eval mode, on the CPU.

        Raises ValueError naming the tensors that are missing, left over or of another shape; before any
        memory is taken.
        """
        with torch.device("meta"):
            expected = DiT.from_config(checkpoint.config).state_dict()
        _require_fitting(checkpoint.state, expected)
        model = DiT.from_config(checkpoint.config)
        model.load_state_dict(checkpoint.state)
        return model.eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction for noisy x [B, C, S, S] at timesteps t [B] (0..999) of classes y [B] (int).

        y == num_classes means no class. Returns [B, out_channels, S, S].
        Raises ValueError for wrong shapes, IndexError for labels out of range (on the CPU).
        """
        self._check(x, t, y)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self._unpatch(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """One call for both halves of classifier-free guidance, ordered [cond, uncond].

        The first half of x [2B, C, S, S] is used for both halves; t [2B]; y [2B] = [classes, no class].
        Channels 0..2 become uncond + cfg_scale * (cond - uncond) in both halves, the others pass
        through half by half (Ho and Salimans, 2022; the channel rule is the DiT family's).
        Raises ValueError for an odd batch.
        """
        if len(x) % 2:
            raise ValueError(f"x: expected an even batch [cond, uncond], got {list(x.shape)}")
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :GUIDED_CHANNELS].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, GUIDED_CHANNELS:]], dim=1)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        side, channels = self.config.input_size, self.config.in_channels
        if x.ndim != 4 or x.shape[1:] != (channels, side, side):
            raise ValueError(f"x: expected [B, {channels}, {side}, {side}], got {list(x.shape)}")
        for name, vector in (("t", t), ("y", y)):
            if vector.shape != x.shape[:1]:
                raise ValueError(
                    f"{name}: expected [{len(x)}], one for each row of x, got {list(vector.shape)}"
                )

    def _unpatch(self, tokens: Tensor) -> Tensor:
        """[B, N, p * p * C], per token (p_row, p_col, channel) -> [B, C, S, S]."""
        grid, patch, channels = self.config.grid, self.config.patch_size, self.config.out_channels
        x = tokens.view(-1, grid, grid, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)

    def _initialise(self) -> None:
        """Xavier for the matrices, zero for adaLN and the output: every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(cast(Tensor, module.bias))
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(cast(Tensor, embedding.weight), std=EMBEDDING_STD)
        for owner in (*self.blocks, self.final_layer):
            nn.init.zeros_(owner.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def _require_fitting(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    left_over = [name for name in state if name not in expected]
    if missing or left_over:
        parts = [
            f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in (("missing", missing), ("unknown", left_over))
            if names
        ]
        raise ValueError(f"state: its tensors are not those of a DiT of its depth: {', '.join(parts)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"state: {name}: expected {list(tensor.shape)}, got {list(state[name].shape)}")


class Block(nn.Module):
    """x += gate * branch(norm(x) * (1 + scale) + shift), for attention and then for the MLP.

    x [B, N, D], c [B, D]; Linear(silu(c)) gives shift, scale and gate of attention, then of the MLP.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over all tokens, [B, N, D] -> [B, N, D]; qkv is split q, k, v,
    head-major.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, channels))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x))), [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class FinalLayer(nn.Module):
    """Tokens to patches, linear(norm(x) * (1 + scale) + shift): [B, N, D] -> [B, N, p * p * out_channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] * (1 + scale [B, D]) + shift [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]
