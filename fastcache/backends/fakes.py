"""Shapes of every operator's outputs, for tracing: the argument checks of eager, and no values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.backends import checks, token_checks

Outputs = tuple[Tensor, Tensor, Tensor]  # updated, h, errors


def residual_update(
    x: Tensor,
    features: Sequence[Tensor],
    gates: Tensor | None = None,
    gate_index: Tensor | None = None,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    norm: int = 0,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    row_slots: Tensor | None = None,
    row_count: int = 0,
    reference: Tensor | None = None,
    need_x: bool = True,
) -> Outputs:
    checks.residual_update(
        x,
        features,
        gates,
        gate_index,
        weights,
        scales,
        norm,
        shift,
        scale,
        norm_weight,
        norm_bias,
        row_slots,
        row_count,
        reference,
    )
    return _stream_outputs(x, norm, row_slots, row_count, reference, need_x)


def residual_update_scatter_(
    x: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_slots: Tensor | None,
    features: Sequence[Tensor],
    position: int = -1,
    slot_scale: Tensor | None = None,
    gates: Tensor | None = None,
    gate_index: Tensor | None = None,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    norm: int = 0,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    row_slots: Tensor | None = None,
    row_count: int = 0,
    reference: Tensor | None = None,
    need_x: bool = True,
) -> Outputs:
    checks.residual_update_scatter(
        x,
        slot,
        fresh,
        fresh_slots,
        features,
        position,
        slot_scale,
        gates,
        gate_index,
        weights,
        scales,
        norm,
        shift,
        scale,
        norm_weight,
        norm_bias,
        row_slots,
        row_count,
        reference,
    )
    return _stream_outputs(x, norm, row_slots, row_count, reference, need_x)


def select_tokens_(
    score: Tensor,
    age: Tensor,
    counts: Tensor,
    capacity: int,
    age_weight: float = 0.0,
    normalize: bool = True,
    width: int = 0,
    cell: int = 0,
    bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    token_checks.select_tokens(score, age, counts, capacity, width, cell, bonus)
    R, N = score.shape
    return age.new_empty(R, N), age.new_empty(R, capacity)


def row_score(x: Tensor, reference: Tensor | None = None) -> Tensor:
    token_checks.row_score(x, reference)
    return x.new_empty(x.shape[:2], dtype=_wide(x))


def value_norm(v: Tensor) -> Tensor:
    token_checks.value_norm(v)
    return v.new_empty((v.shape[0], v.shape[2]), dtype=_wide(v))


def attention_received(q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    token_checks.attention_received(q, k, lse)
    return q.new_empty((k.shape[0], k.shape[2]), dtype=_wide(q))


def relative_error(newest: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
    token_checks.relative_error(newest, earlier)
    return newest[0].new_empty((len(earlier) // len(newest), len(newest)), dtype=_wide(newest[0]))


def _stream_outputs(
    x: Tensor, norm: int, row_slots: Tensor | None, row_count: int, reference: Tensor | None, need_x: bool
) -> Outputs:
    B, N, D = x.shape
    updated = x.new_empty((B, N, D) if need_x else 0)
    h = x.new_empty((B, N if row_slots is None else row_count, D) if norm else 0)
    errors = x.new_empty(0 if reference is None else (B, 3), dtype=torch.float32)
    return updated, h, errors


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
