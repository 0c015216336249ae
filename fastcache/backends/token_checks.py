"""Argument checks of the operators that score and choose tokens, shared by the eager and fake kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.backends.checks import (
    FLOATS,
    MAX_TERMS,
    _device,
    _dtype,
    _require,
    _shape,
    _symbolic,
    _unit_stride,
)


def select_tokens(
    score: Tensor, age: Tensor, counts: Tensor, capacity: int, width: int, cell: int, bonus: float
) -> None:
    """Raise ValueError, TypeError or IndexError if the arguments of `select_tokens_` do not fit together."""
    _require(score.ndim == 2, f"score: expected [R, N], got {list(score.shape)}")
    _require(
        score.dtype in (torch.float32, torch.float64),
        f"score: expected float32 (or float64 in eager), got {score.dtype}",
        TypeError,
    )
    R, N = score.shape
    for name, tensor, shape in (("age", age, (R, N)), ("counts", counts, (R,))):
        _shape(name, tensor, shape)
        _dtype(name, tensor, torch.int32)
        _device(name, tensor, score)
    _require(capacity >= 0, f"capacity: expected 0 or more, got {capacity}")
    _require(cell >= 0, f"cell: expected 0 (no bonus) or more tokens a side, got {cell}")
    if cell > 0:
        grid = width > 0 and N % width == 0 and width % cell == 0 and N // width % cell == 0
        _require(
            grid,
            f"width, cell: expected a grid of {cell} x {cell} cells over {N} tokens, {width} a line, got"
            f" sides that {cell} does not divide",
        )
    _require(
        cell > 0 or bonus == 0.0,
        f"cell: a bonus of {bonus} needs cells of 1 or more tokens a side, got {cell}",
    )
    if counts.device.type == "cpu" and not _symbolic(counts) and R:
        low, high = int(counts.min()), int(counts.max())
        _require(
            low >= 0 and high <= min(N, capacity),
            f"counts: expected 0..{min(N, capacity)} (tokens, and capacity), got {low}..{high}",
            IndexError,
        )


def row_score(x: Tensor, reference: Tensor | None) -> None:
    """Raise ValueError or TypeError if the arguments of `row_score` do not fit together."""
    _rows("x", x, 3, "[B, N, D]")
    if reference is not None:
        _shape("reference", reference, tuple(x.shape))
        _rows("reference", reference, 3, "[B, N, D]")
        _device("reference", reference, x)


def value_norm(v: Tensor) -> None:
    """Raise ValueError or TypeError if `v` is not [B, H, N, d]."""
    _rows("v", v, 4, "[B, H, N, d]")


def attention_received(q: Tensor, k: Tensor, lse: Tensor | None) -> None:
    """Raise ValueError or TypeError if the arguments of `attention_received` do not fit together."""
    _rows("q", q, 4, "[B, H, N, d]")
    _rows("k", k, 4, "[B, H, M, d]")
    B, H, N, d = q.shape
    _require(
        (k.shape[0], k.shape[1], k.shape[3]) == (B, H, d),
        f"k: expected [{B}, {H}, M, {d}], got {list(k.shape)}",
    )
    _require(k.dtype == q.dtype, f"k: expected {q.dtype} as q, got {k.dtype}", TypeError)
    _device("k", k, q)
    if lse is not None:
        _shape("lse", lse, (B, H, N))
        _require(
            lse.dtype == torch.float32 or lse.dtype == q.dtype,
            f"lse: expected float32, got {lse.dtype}",
            TypeError,
        )
        _device("lse", lse, q)


def relative_error(newest: Sequence[Tensor], earlier: Sequence[Tensor]) -> None:
    """Raise ValueError or TypeError if the arguments of `relative_error` do not fit together."""
    _require(len(newest) > 0, "newest: expected at least one feature, got none")
    _require(
        len(earlier) % len(newest) == 0,
        f"earlier: expected a multiple of {len(newest)} features (one per newest and look-ahead), got"
        f" {len(earlier)}",
    )
    _require(len(earlier) <= MAX_TERMS, f"earlier: at most {MAX_TERMS} in one call, got {len(earlier)}")
    first = newest[0]
    for name, tensors in (("newest", newest), ("earlier", earlier)):
        for j, tensor in enumerate(tensors):
            _rows(f"{name}[{j}]", tensor, 3, "[B, N, D]")
            _shape(f"{name}[{j}]", tensor, tuple(first.shape))
            _require(
                tensor.dtype == first.dtype,
                f"{name}[{j}]: all features have one dtype, expected {first.dtype}, got {tensor.dtype}",
                TypeError,
            )
            _device(f"{name}[{j}]", tensor, first)


def _rows(name: str, tensor: Tensor, rank: int, shape: str) -> None:
    _require(tensor.ndim == rank, f"{name}: expected {shape}, got {list(tensor.shape)}")
    _require(
        tensor.dtype in FLOATS,
        f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}",
        TypeError,
    )
    _unit_stride(name, tensor)
