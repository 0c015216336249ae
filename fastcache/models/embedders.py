"""What a DiT adds up before its first block: patches, positions, the timestep and the label."""

import math
from typing import cast

import torch
from torch import Tensor, nn

FREQUENCIES = 128  # cosines and as many sines of the timestep


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] -> [B, N, D], N row-major over the patch grid."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """E(t) = W2 silu(W1 [cos(t f), sin(t f)]), f_i = 10000^(-i/128), i < 128: [B] -> [B, D].

    t is in units of the training schedule (0..999) and may be fractional; the angles are float32.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32) / FREQUENCIES
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        weight = cast(Tensor, self.mlp[0].weight)
        return self.mlp(waves.to(weight.dtype))


class LabelEmbedder(nn.Module):
    """One row per class and one more, index `num_classes`, for "no class" (guidance): [B] -> [B, D]."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        try:
            return self.embedding_table(y)
        except IndexError as error:
            raise IndexError(
                f"y: labels must lie in 0..{self.num_classes} ({self.num_classes} means no class), got"
                f" {y.tolist()}"
            ) from error


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Position table [1, grid * grid, D] in float32: [sin(w o), cos(w o), sin(h o), cos(h o)].

    w is the column and h the row of a token, o_i = 10000^(-i / (D/4)), i < D/4. Computed in float64.
    """
    exponent = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * 10_000.0**-exponent
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, D / 2]
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, hidden_size).float()
