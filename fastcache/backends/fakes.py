"""Shapes of every operator's outputs, for tracing: the argument checks of eager, and no values."""

import torch

from fastcache.backends import checks, token_checks


def residual_update(
    x,
    features,
    gates=None,
    gate_index=None,
    weights=None,
    scales=None,
    norm=0,
    shift=None,
    scale=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-6,
    row_slots=None,
    row_count=0,
    reference=None,
    need_x=True,
):
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
    x,
    slot,
    fresh,
    fresh_slots,
    features,
    position=-1,
    slot_scale=None,
    gates=None,
    gate_index=None,
    weights=None,
    scales=None,
    norm=0,
    shift=None,
    scale=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-6,
    row_slots=None,
    row_count=0,
    reference=None,
    need_x=True,
):
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


def select_tokens_(score, age, counts, capacity, age_weight=0.0, normalize=True, width=0, cell=0, bonus=0.0):
    token_checks.select_tokens(score, age, counts, capacity, width, cell, bonus)
    R, N = score.shape
    return age.new_empty(R, N), age.new_empty(R, capacity)


def row_score(x, reference=None):
    token_checks.row_score(x, reference)
    return x.new_empty(x.shape[:2], dtype=_wide(x))


def value_norm(v):
    token_checks.value_norm(v)
    return v.new_empty((v.shape[0], v.shape[2]), dtype=_wide(v))


def attention_received(q, k, lse=None, scale=None):
    token_checks.attention_received(q, k, lse)
    return q.new_empty((k.shape[0], k.shape[2]), dtype=_wide(q))


def relative_error(newest, earlier):
    token_checks.relative_error(newest, earlier)
    return newest[0].new_empty((len(earlier) // len(newest), len(newest)), dtype=_wide(newest[0]))


def _stream_outputs(x, norm, row_slots, row_count, reference, need_x):
    B, N, D = x.shape
    updated = x.new_empty((B, N, D) if need_x else 0)
    h = x.new_empty((B, N if row_slots is None else row_count, D) if norm else 0)
    errors = x.new_empty(0 if reference is None else (B, 3), dtype=torch.float32)
    return updated, h, errors


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
