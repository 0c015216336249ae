"""The triton backend: describes tensors to the kernels of `fastcache.kernels` and launches them.

On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests. The features' addresses
travel in a small device table that is kept, so that a repeated step copies nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.backends import checks
from fastcache.backends.constants import constant_row
from fastcache.backends.index_flags import error_flag
from fastcache.backends.triton_attention import attention_received  # noqa: F401  (part of this backend)
from fastcache.backends.triton_config import RowConfig, SumConfig, row_config, sum_config
from fastcache.backends.triton_launch import aligned, current_device
from fastcache.backends.tuning import tuned
from fastcache.backends.tuning_key import row_bucket, term_bucket
from fastcache.kernels.residual_update import row_kernel, sum_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.uint8,
}


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
    """`fastcache.backends.eager.residual_update`, one launch."""
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
    return _launch(
        x,
        features,
        len(features),
        None,
        None,
        None,
        None,
        gates,
        gate_index,
        weights,
        scales,
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
    """`fastcache.backends.eager.residual_update_scatter_`, one launch."""
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
    position = len(features) if position < 0 else position
    return _launch(
        x,
        features,
        position,
        slot,
        fresh,
        fresh_slots,
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
        eps,
        row_slots,
        row_count,
        reference,
        need_x,
    )


@dataclass(frozen=True)
class VectorView:
    """A vector for a kernel: mode 0 absent, 1 per sample, 2 per frame of `tokens` tokens; strides in
    elements.
    """

    mode: int = 0
    batch: int = 0
    frame: int = 0
    tokens: int = 1


def vector_view(vector: Tensor | None, x: Tensor, packed: bool = False) -> VectorView:
    """Describe [D], [B, D], [B, 1, D], [B, F, D] or [B, N, D] (after the packing dimension)."""
    if vector is None:
        return VectorView()
    shape, strides = (vector.shape[1:], vector.stride()[1:]) if packed else (vector.shape, vector.stride())
    if len(shape) == 1:
        return VectorView(1)
    batch = strides[0] if shape[0] > 1 else 0
    if len(shape) == 2 or shape[1] == 1:
        return VectorView(1, batch)
    return VectorView(2, batch, strides[1], max(1, x.shape[1] // shape[1]))


def _launch(
    x: Tensor,
    features: Sequence[Tensor],
    position: int,
    slot: Tensor | None,
    fresh: Tensor | None,
    fresh_slots: Tensor | None,
    slot_scale: Tensor | None,
    gates: Tensor | None,
    gate_index: Tensor | None,
    weights: Tensor | None,
    scales: Tensor | None,
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
    B, N, D = x.shape
    # small index and factor tensors are read densely; features, gates and vectors as they are
    gate_index, weights, scales, fresh_slots, row_slots = (
        None if t is None else t.contiguous() for t in (gate_index, weights, scales, fresh_slots, row_slots)
    )
    out = torch.empty((B, N, D), dtype=x.dtype, device=x.device) if need_x else x.new_empty(0)
    packed_rows = row_slots is not None
    h = (x.new_zeros if packed_rows else x.new_empty)((B, row_count if packed_rows else N, D) if norm else 0)
    partial = torch.empty(0 if reference is None else (B, N, 3), dtype=torch.float32, device=x.device)
    if x.numel():
        operands = [
            t
            for t in (x, *features, gates, slot, fresh, shift, scale, norm_weight, norm_bias, reference)
            if t is not None
        ]
        pointer_align, unit = (16, 8) if all(aligned(t) for t in operands) and D % 8 == 0 else (1, 1)
        gate = vector_view(gates, x, packed=gate_index is not None)
        slot_float8 = slot_scale is not None
        stored = slot.view(torch.uint8) if slot is not None and slot_float8 else slot
        table = address_table(
            tuple(
                value for f in features for value in (f.data_ptr(), f.stride(0) // unit, f.stride(1) // unit)
            ),
            x.device,
        )
        shared: dict[str, Any] = dict(
            D=D,
            F=TYPES[features[0].dtype] if features else tl.float32,
            FLOAT8=bool(features) and features[0].dtype == torch.float8_e4m3fn,
            GATE=gate.mode,
            PACKED=gate_index is not None,
            WEIGHTED=weights is not None,
            SCALED=scales is not None,
            SLOT=slot is not None,
            MAPPED=fresh_slots is not None,
            WRITE=need_x,
            ALIGN=pointer_align,
            UNIT=unit,
        )

        # unused pointers are never followed
        def or_x(tensor: Tensor | None) -> Tensor:
            return x if tensor is None else tensor

        def strides(tensor: Tensor | None) -> tuple[int, ...]:
            return (0, 0) if tensor is None else tuple(stride // unit for stride in tensor.stride()[:2])

        packed_gates = None if gate_index is None else gates
        gate_row = 0 if packed_gates is None else packed_gates.stride(0)
        gate_count = 0 if packed_gates is None else packed_gates.shape[0]
        buckets = term_bucket(len(features)), row_bucket(B * N)
        with current_device(x.device):
            if norm == 0 and reference is None and not slot_float8:
                measured = tuned("triton.sum", x.device, D, x.dtype, buckets[0], buckets[1])
                tile = (
                    measured
                    if isinstance(measured, SumConfig)
                    else sum_config(B, N, D, len(features), shared["FLOAT8"])
                )
                grid = (triton.cdiv(D, tile.columns), triton.cdiv(N, tile.rows), B)
                sum_kernel[grid](
                    x,
                    out,
                    table,
                    or_x(gates),
                    or_x(gate_index),
                    or_x(weights),
                    or_x(scales),
                    or_x(stored),
                    or_x(fresh),
                    or_x(fresh_slots),
                    error_flag(x.device),
                    N,
                    len(features),
                    position,
                    gate.tokens,
                    gate_count,
                    0 if fresh is None else fresh.shape[1],
                    *strides(x),
                    gate_row // unit,
                    gate.batch // unit,
                    gate.frame // unit,
                    *strides(slot),
                    *strides(fresh),
                    **shared,
                    ROWS=tile.rows,
                    COLUMNS=tile.columns,
                    STAGES=tile.stages,
                    num_warps=tile.warps,
                )
            else:
                measured = tuned("triton.row", x.device, D, x.dtype, buckets[0], buckets[1])
                config = measured if isinstance(measured, RowConfig) else row_config(D)
                shifted, scaled = vector_view(shift, x), vector_view(scale, x)
                row_kernel[(N, B)](
                    x,
                    out if need_x else x,
                    h,
                    partial,
                    table,
                    or_x(gates),
                    or_x(gate_index),
                    or_x(weights),
                    or_x(scales),
                    or_x(stored),
                    or_x(slot_scale),
                    or_x(fresh),
                    or_x(fresh_slots),
                    or_x(shift),
                    or_x(scale),
                    or_x(norm_weight),
                    or_x(norm_bias),
                    or_x(row_slots),
                    or_x(reference),
                    error_flag(x.device),
                    N,
                    len(features),
                    position,
                    gate.tokens,
                    gate_count,
                    0 if fresh is None else fresh.shape[1],
                    row_count if packed_rows else N,
                    eps,
                    *strides(x),
                    gate_row // unit,
                    gate.batch // unit,
                    gate.frame // unit,
                    *strides(slot),
                    *strides(fresh),
                    *((0, 0) if slot_scale is None else slot_scale.stride()),
                    shifted.batch // unit,
                    shifted.frame // unit,
                    shifted.tokens,
                    scaled.batch // unit,
                    scaled.frame // unit,
                    scaled.tokens,
                    *strides(reference),
                    **shared,
                    SLOT_FLOAT8=slot_float8,
                    NORM=int(norm),
                    SHIFT=shifted.mode,
                    SCALE=scaled.mode,
                    NORM_WEIGHT=norm_weight is not None,
                    NORM_BIAS=norm_bias is not None,
                    ROW_SLOTS=packed_rows,
                    REFERENCE=reference is not None,
                    COLUMNS=config.columns,
                    STAGES=config.stages,
                    num_warps=config.warps,
                )
    errors = (
        partial
        if reference is None
        else (
            partial.sum(1, dtype=torch.float64).float()
            if x.numel()
            else x.new_zeros(B, 3, dtype=torch.float32)
        )
    )
    return out, h, errors


def address_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Device int64 table of (address, batch stride, token stride) per feature."""
    return constant_row(values or (0,), torch.int64, device)
