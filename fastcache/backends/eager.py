"""The definition: every operator in plain PyTorch, written to be read.

All other backends are measured against this file, and this file against itself in float64
(float64 inputs are computed in float64, all others in float32). It runs wherever PyTorch runs,
reads nothing back to the host, and is the fallback of every device.

Shapes: x [B, N, D]; features J x [B, N, D]; a *vector* is [D], [B, D], [B, 1, D], [B, F, D]
(F divides N: one row for N / F consecutive tokens) or [B, N, D].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.backends import checks
from fastcache.backends.eager_tokens import (
    attention_received,
    relative_error,
    row_score,
    select_tokens_,
    value_norm,
)

__all__ = [
    "attention_received",
    "relative_error",
    "residual_update",
    "residual_update_scatter_",
    "row_score",
    "select_tokens_",
    "value_norm",
]
FLOAT8_MAX = 448.0  # largest finite float8_e4m3fn


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
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = x + sum_j w_j * g_j * (s_j * F_j), then optionally h = norm(x') * (1 + scale) + shift.

    Accumulated in fp32 in term order, rounded once to x.dtype; the norm reads the rounded x', so
    that a fused and an unfused step see the same numbers. Returns (x', h, errors [B, 3]), fresh
    tensors, of shape [0] if not asked for. csrc/schema.def has every argument.
    """
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
    terms = [decompressed(feature, scales, j, x) for j, feature in enumerate(features)]
    return _outputs(
        x,
        terms,
        terms[-1] if terms else None,
        gates,
        gate_index,
        weights,
        norm,
        shift,
        scale,
        norm_weight,
        norm_bias,
        eps,
        row_slots,
        row_count,
        reference,
        need_x,
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_update` in which the term at `position` is `slot` after it took its fresh rows.

    slot [B, N, D] (and slot_scale [B, N] if it is float8) are written in place:
    slot[b, n] = fresh[b, fresh_slots[b, n]] where fresh_slots[b, n] >= 0, all rows without a map.
    Source of the method: ToCa, token-wise refresh (docs/methods/toca.md, "A partial step").
    """
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
    x, fresh, features = (
        copied_if_overlapping(x, slot),
        copied_if_overlapping(fresh, slot),
        [copied_if_overlapping(feature, slot) for feature in features],
    )
    reference, gates, shift, scale, norm_weight, norm_bias = (
        None if t is None else copied_if_overlapping(t, slot)
        for t in (reference, gates, shift, scale, norm_weight, norm_bias)
    )
    if scales is not None and slot_scale is not None:
        scales = copied_if_overlapping(scales, slot_scale)
    store_rows_(slot, fresh, fresh_slots, slot_scale)
    position = len(features) if position < 0 else position
    terms = [decompressed(feature, scales, j + (j >= position), x) for j, feature in enumerate(features)]
    refreshed = widened(slot, x) if slot_scale is None else widened(slot, x) * slot_scale[..., None]
    terms.insert(position, refreshed)
    return _outputs(
        x,
        terms,
        refreshed,
        gates,
        gate_index,
        weights,
        norm,
        shift,
        scale,
        norm_weight,
        norm_bias,
        eps,
        row_slots,
        row_count,
        reference,
        need_x,
    )


def _outputs(
    x: Tensor,
    terms: Sequence[Tensor],
    newest: Tensor | None,
    gates: Tensor | None,
    gate_index: Tensor | None,
    weights: Tensor | None,
    norm: int,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    row_slots: Tensor | None,
    row_count: int,
    reference: Tensor | None,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = widened(x, x)
    for j, feature in enumerate(terms):
        coefficient = gate_of_term(gates, gate_index, j, x)
        if weights is not None:
            coefficient = weights[j].to(total.dtype) if coefficient is None else weights[j] * coefficient
        total = total + (feature if coefficient is None else coefficient * feature)
    updated = fresh_contiguous(total, x.dtype, x)
    h = (
        modulated_rows(updated, norm, shift, scale, norm_weight, norm_bias, eps, row_slots, row_count)
        if norm
        else x.new_empty(0)
    )
    errors = (
        x.new_empty(0, dtype=torch.float32)
        if reference is None or newest is None
        else error_sums(newest, widened(reference, x))
    )
    return updated if need_x else x.new_empty(0), h, errors


def modulated_rows(
    x: Tensor,
    norm: int,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    row_slots: Tensor | None,
    row_count: int,
) -> Tensor:
    """h = norm(x) * (1 + scale) + shift for all rows, or for those with a slot, packed [B, K, D].

    Packed rows that no token maps to are zero. Norms: 1 LayerNorm, 2 RMSNorm, 3 identity.
    """
    B, N, D = x.shape
    row = widened(x, x)
    shift, scale = (None if v is None else tokenwise(v, x) for v in (shift, scale))
    if row_slots is not None:
        index = packed_index(row_slots, row_count)
        row = take_rows(row, index)
        shift, scale = (None if v is None else take_rows(v.expand(B, N, D), index) for v in (shift, scale))
    if norm == checks.LAYER:
        row = row - row.mean(-1, keepdim=True)
    if norm in (checks.LAYER, checks.RMS):
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    if norm_weight is not None:
        row = row * widened(norm_weight, x)
    if norm_bias is not None:
        row = row + widened(norm_bias, x)
    if scale is not None:
        row = row * (1 + scale)
    if shift is not None:
        row = row + shift
    if row_slots is not None:
        row = torch.where((index >= 0)[..., None], row, torch.zeros((), dtype=row.dtype, device=row.device))
    return fresh_contiguous(row, x.dtype, x)


def error_sums(feature: Tensor, reference: Tensor) -> Tensor:
    """[B, 3] float32: sum|F - R|, sum|F|, sum|R| over tokens and channels (relative L1 error)."""
    parts = [(feature - reference).abs(), feature.abs(), reference.abs()]
    return torch.stack([part.sum((1, 2), dtype=torch.float64) for part in parts], dim=1).float()


def store_rows_(slot: Tensor, fresh: Tensor, fresh_slots: Tensor | None, slot_scale: Tensor | None) -> None:
    """Write fresh rows into an owned slot, compressed to float8 with one scale a row if it is so."""
    fresh_scale = None
    if slot_scale is not None:
        largest = fresh.float().abs().amax(-1)
        fresh_scale = torch.where(largest > 0, largest / FLOAT8_MAX, torch.ones_like(largest))
        fresh = fresh.float() / fresh_scale[..., None]
    fresh = fresh.to(slot.dtype)
    if fresh_slots is None:
        slot.copy_(fresh)
        if slot_scale is not None and fresh_scale is not None:
            slot_scale.copy_(fresh_scale)
        return
    kept, source = fresh_slots < 0, fresh_slots.clamp(min=0).long()
    if fresh.shape[1] == 0:
        return
    taken = fresh.view(torch.uint8) if slot.dtype == torch.float8_e4m3fn else fresh
    target = slot.view(torch.uint8) if slot.dtype == torch.float8_e4m3fn else slot
    target.copy_(torch.where(kept[..., None], target, take_rows(taken, source)))
    if slot_scale is not None and fresh_scale is not None:
        slot_scale.copy_(torch.where(kept, slot_scale, fresh_scale.gather(1, source)))


def gate_of_term(gates: Tensor | None, gate_index: Tensor | None, j: int, x: Tensor) -> Tensor | None:
    """Gate of term j, broadcastable to [B, N, D], or None. A row of -1 means a gate of one."""
    if gates is None:
        return None
    if gate_index is None:
        return tokenwise(gates, x)
    row = gate_index[j].long()
    picked = gates.index_select(0, row.clamp(min=0)[None])[0]
    return torch.where(
        row < 0, torch.ones((), dtype=widened(gates, x).dtype, device=x.device), tokenwise(picked, x)
    )


def tokenwise(vector: Tensor, x: Tensor) -> Tensor:
    """A vector in the accumulation type, shaped to broadcast over x [B, N, D]."""
    vector = widened(vector, x)
    if vector.ndim == 2:
        return vector[:, None]
    if vector.ndim == 3 and vector.shape[1] not in (1, x.shape[1]):
        return vector.repeat_interleave(x.shape[1] // vector.shape[1], dim=1)
    return vector


def decompressed(feature: Tensor, scales: Tensor | None, j: int, x: Tensor) -> Tensor:
    """Feature j in the accumulation type, times its row scales if there are any."""
    return widened(feature, x) if scales is None else widened(feature, x) * scales[j][..., None]


def widened(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor in the accumulation type: float64 for float64 x, float32 for all others."""
    return tensor.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def fresh_contiguous(tensor: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
    """The tensor in a dtype, dense, and in other memory than x."""
    result = tensor.to(dtype).contiguous()
    return result.clone() if share_memory(result, x) else result


def copied_if_overlapping(tensor: Tensor, written: Tensor) -> Tensor:
    """A copy of an input that shares memory with what will be written, else the input itself."""
    return tensor.clone() if share_memory(tensor, written) else tensor


def share_memory(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are views of one storage (while tracing: if they are one object)."""
    return a is b or (
        not torch.compiler.is_compiling() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def packed_index(slots: Tensor, count: int) -> Tensor:
    """Invert a slot map [B, N] into token indices [B, count], -1 where no token maps to the row."""
    B, N = slots.shape
    index = torch.full((B, count + 1), -1, dtype=torch.long, device=slots.device)
    tokens = torch.arange(N, device=slots.device).expand(B, N)
    return index.scatter_(1, torch.where(slots >= 0, slots, count).long(), tokens)[:, :count]


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, N, D] at index [B, K] (negative: row 0, to be masked by the caller) -> [B, K, D]."""
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], index.shape[1], rows.shape[2])
    return rows.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, rows.shape[2]))
