"""The residual stream operators in Triton: a tile kernel for sums, a row kernel for norms.

sum_kernel   x' = x + sum_j w_j * g_j * F_j, and the refresh of one slot, tile by tile.
             Moves (J + 2) * N * e bytes (e: bytes an element; gates are L2 hits). Memory-bound;
             tile [ROWS, COLUMNS] of one sample, so that a gate vector is loaded once for ROWS
             rows, and 8 or more elements a thread, so that loads are 16 bytes wide.
row_kernel   the same on whole rows, then norm, modulate, packed rows, float8 store and error
             sums, from registers: x' is never read back. One row a program; two-pass variance.

Features come through a device table of (address, batch stride, token stride): the number of terms
is a run-time value and never recompiles. D is a compile-time value: it is a constant of the model,
and with a run-time D Triton would fall back to 2-byte loads. Values are accumulated in fp32 in
term order and rounded once; float8 is converted by bits, the same on every architecture.
"""

import triton
import triton.language as tl

BAD_GATE = tl.constexpr(1)  # bits of the sticky error flag
BAD_SLOT = tl.constexpr(2)

# Run-time numbers change from call to call and must not be compiled in (a 1, or a multiple of 16, would
# be); small tables are read one number at a time, wherever they start. What is left are D, dtypes and forms.
NUMBERS = (
    "N",
    "terms",
    "position",
    "frame_tokens",
    "gate_count",
    "fresh_count",
    "row_count",
    "x_batch",
    "x_token",
    "gate_row",
    "gate_batch",
    "gate_frame",
    "slot_batch",
    "slot_token",
    "fresh_batch",
    "fresh_token",
    "held_batch",
    "held_token",
    "shift_batch",
    "shift_frame",
    "shift_tokens",
    "scale_batch",
    "scale_frame",
    "scale_tokens",
    "reference_batch",
    "reference_token",
)
TABLES = (
    "table",
    "gate_index",
    "weights",
    "scales",
    "slot_scale",
    "fresh_slots",
    "row_slots",
    "flag",
    "errors",
)


@triton.jit
def _from_float8(bits):
    """float8_e4m3fn bits (uint8) to fp32: shifted into fp16, whose exponent bias is 8 higher."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _to_float8(value):
    """fp32 in +-448 to float8_e4m3fn bits, round to nearest even; NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # normal numbers: drop 20 mantissa bits with rounding, rebias the exponent from 127 to 7
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # subnormals (below 2^-6): adding 2^14 leaves the value in units of 2^-9 in the low bits, rounded
    tiny = ((magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True)) - 0x46800000
    small = magnitude < 0x3C800000
    encoded = tl.where(small, tiny, normal)
    encoded = tl.where(magnitude > 0x7F800000, 0x7F, tl.minimum(encoded, 0x7E))
    encoded = tl.where(magnitude == 0x7F800000, 0x7F, encoded)
    return (encoded | sign).to(tl.uint8)


@triton.jit
def _widened(value, FLOAT8: tl.constexpr):
    return _from_float8(value) if FLOAT8 else value.to(tl.float32)


@triton.jit
def _coefficient(
    gates,
    gate_index,
    weights,
    j,
    b,
    frame,
    columns,
    inside,
    gate_row,
    gate_batch,
    gate_frame,
    gate_count,
    flag,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """w_j * g_j for the columns: [1, C] for a gate per sample, [R, C] for one per frame or token."""
    coefficient = tl.full([1, 1], 1.0, tl.float32)
    if GATE > 0:
        row = tl.zeros([], tl.int32)
        if PACKED:
            row = tl.load(gate_index + j)
            bad = (row >= gate_count) | (row < -1)
            tl.atomic_or(flag, BAD_GATE, mask=bad)
            row = tl.where(bad, -1, row)
        start = gates + tl.maximum(row, 0).to(tl.int64) * gate_row * UNIT + b * gate_batch * UNIT
        start = tl.multiple_of(start, ALIGN)
        if GATE == 1:
            coefficient = tl.load(start + columns[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        else:
            coefficient = tl.load(
                start + frame[:, None] * gate_frame * UNIT + columns[None, :], mask=inside[None, :], other=0.0
            ).to(tl.float32)
        if PACKED:
            coefficient = tl.where(row >= 0, coefficient, tl.where(bad, float("nan"), 1.0))
    if WEIGHTED:
        coefficient = coefficient * tl.load(weights + j)
    return coefficient


@triton.jit
def _feature(
    table,
    j,
    b,
    tokens,
    columns,
    mask,
    F: tl.constexpr,
    FLOAT8: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows of feature j in fp32; its address and strides come from the table."""
    start = tl.load(table + 3 * j).to(tl.pointer_type(F)) + b * tl.load(table + 3 * j + 1) * UNIT
    stride = tl.load(table + 3 * j + 2) * UNIT
    start = tl.multiple_of(start, ALIGN)
    return _widened(
        tl.load(
            start + tokens[:, None] * stride + columns[None, :],
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        ),
        FLOAT8,
    )


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def sum_kernel(
    x,
    out,
    table,
    gates,
    gate_index,
    weights,
    scales,
    slot,
    fresh,
    fresh_slots,
    flag,
    N,
    terms,
    position,
    frame_tokens,
    gate_count,
    fresh_count,
    x_batch,
    x_token,
    gate_row,
    gate_batch,
    gate_frame,
    slot_batch,
    slot_token,
    fresh_batch,
    fresh_token,
    D: tl.constexpr,
    F: tl.constexpr,
    FLOAT8: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    SLOT: tl.constexpr,
    MAPPED: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One [ROWS, COLUMNS] tile of one sample. Grid: (column tiles, row tiles, B)."""
    b = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    mask = (tokens < N)[:, None] & inside[None, :]
    frame = tl.minimum(tokens, N - 1) // frame_tokens
    start = tl.multiple_of(x + b * x_batch * UNIT, ALIGN)
    total = tl.load(start + tokens[:, None] * x_token * UNIT + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    for j in tl.range(0, position, num_stages=STAGES):
        value = _feature(table, j, b, tokens, columns, mask, F, FLOAT8, ALIGN, UNIT)
        if SCALED:
            value = (
                value
                * tl.load(scales + (j * tl.num_programs(2) + b) * N + tokens, mask=tokens < N, other=0.0)[
                    :, None
                ]
            )
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                j,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * value
        )
    if SLOT:
        old = (
            tl.multiple_of(slot + b * slot_batch * UNIT, ALIGN)
            + tokens[:, None] * slot_token * UNIT
            + columns[None, :]
        )
        source = tokens
        if MAPPED:
            source = tl.load(fresh_slots + b * N + tokens, mask=tokens < N, other=-1).to(tl.int64)
            bad = (source >= fresh_count) | (source < -1)
            tl.atomic_or(flag, BAD_SLOT, mask=tl.max(bad.to(tl.int32), 0) > 0)
            source = tl.where(bad, -1, source)
        taken = (source >= 0)[:, None]
        new = tl.load(
            tl.multiple_of(fresh + b * fresh_batch * UNIT, ALIGN)
            + tl.maximum(source, 0)[:, None] * fresh_token * UNIT
            + columns[None, :],
            mask=mask & taken,
            other=0.0,
        )
        new = new.to(slot.dtype.element_ty)
        kept = tl.load(old, mask=mask & (taken == 0), other=0.0)
        tl.store(old, new, mask=mask & taken)
        value = tl.where(taken, new, kept).to(tl.float32)
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                position,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * value
        )
    for j in tl.range(position + SLOT, terms + SLOT, num_stages=STAGES):
        value = _feature(table, j - SLOT, b, tokens, columns, mask, F, FLOAT8, ALIGN, UNIT)
        if SCALED:
            value = (
                value
                * tl.load(scales + (j * tl.num_programs(2) + b) * N + tokens, mask=tokens < N, other=0.0)[
                    :, None
                ]
            )
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                j,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * value
        )
    if WRITE:
        tl.store(
            out + (b * N + tokens)[:, None] * D + columns[None, :], total.to(out.dtype.element_ty), mask=mask
        )


@triton.jit
def _modulator(
    vector,
    b,
    frame,
    columns,
    mask,
    batch,
    stride,
    MODE: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Row of a shift or scale: [1, C]."""
    start = vector + b * batch * UNIT
    if MODE == 2:
        start += frame * stride * UNIT
    start = tl.multiple_of(start, ALIGN)
    return tl.load(start + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=TABLES)
def row_kernel(
    x,
    out,
    h,
    errors,
    table,
    gates,
    gate_index,
    weights,
    scales,
    slot,
    slot_scale,
    fresh,
    fresh_slots,
    shift,
    scale,
    norm_weight,
    norm_bias,
    row_slots,
    reference,
    flag,
    N,
    terms,
    position,
    frame_tokens,
    gate_count,
    fresh_count,
    row_count,
    eps,
    x_batch,
    x_token,
    gate_row,
    gate_batch,
    gate_frame,
    slot_batch,
    slot_token,
    fresh_batch,
    fresh_token,
    held_batch,
    held_token,
    shift_batch,
    shift_frame,
    shift_tokens,
    scale_batch,
    scale_frame,
    scale_tokens,
    reference_batch,
    reference_token,
    D: tl.constexpr,
    F: tl.constexpr,
    FLOAT8: tl.constexpr,
    GATE: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    SLOT: tl.constexpr,
    MAPPED: tl.constexpr,
    SLOT_FLOAT8: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    NORM_WEIGHT: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ROW_SLOTS: tl.constexpr,
    REFERENCE: tl.constexpr,
    WRITE: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One token. Grid: (N, B). COLUMNS is the power of two that covers D."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64)
    tokens = n + tl.arange(0, 1)
    columns = tl.arange(0, COLUMNS)
    inside = columns < D
    mask = inside[None, :]
    frame = tokens // frame_tokens
    newest = tl.zeros([1, COLUMNS], tl.float32)
    start = tl.multiple_of(x + b * x_batch * UNIT, ALIGN)
    total = tl.load(start + tokens[:, None] * x_token * UNIT + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    for j in tl.range(0, position, num_stages=STAGES):
        value = _feature(table, j, b, tokens, columns, mask, F, FLOAT8, ALIGN, UNIT)
        if SCALED:
            value = value * tl.load(scales + (j * tl.num_programs(1) + b) * N + n)
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                j,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * value
        )
        newest = value
    if SLOT:
        old = (
            tl.multiple_of(slot + b * slot_batch * UNIT, ALIGN)
            + tokens[:, None] * slot_token * UNIT
            + columns[None, :]
        )
        source = tokens
        if MAPPED:
            source = tl.load(fresh_slots + b * N + tokens).to(tl.int64)
            bad = (source >= fresh_count) | (source < -1)
            tl.atomic_or(flag, BAD_SLOT, mask=tl.max(bad.to(tl.int32), 0) > 0)
            source = tl.where(bad, -1, source)
        taken = (source >= 0)[:, None]
        new = tl.load(
            tl.multiple_of(fresh + b * fresh_batch * UNIT, ALIGN)
            + tl.maximum(source, 0)[:, None] * fresh_token * UNIT
            + columns[None, :],
            mask=mask & taken,
            other=0.0,
        )
        if SLOT_FLOAT8:
            largest = tl.max(tl.abs(new.to(tl.float32)), 1)
            row_scale = tl.where(largest > 0, largest / 448.0, 1.0)
            encoded = _to_float8(
                tl.clamp(
                    new.to(tl.float32) / row_scale[:, None], -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL
                )
            )
            held = tl.load(slot_scale + b * held_batch + tokens * held_token)
            value = tl.where(taken, encoded, tl.load(old, mask=mask & (taken == 0), other=0))
            row_scale = tl.where(source >= 0, row_scale, held)
            tl.store(old, encoded, mask=mask & taken)
            tl.store(slot_scale + b * held_batch + tokens * held_token, row_scale)
            newest = _from_float8(value) * row_scale[:, None]
        else:
            new = new.to(slot.dtype.element_ty)
            kept = tl.load(old, mask=mask & (taken == 0), other=0.0)
            tl.store(old, new, mask=mask & taken)
            newest = tl.where(taken, new, kept).to(tl.float32)
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                position,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * newest
        )
    for j in tl.range(position + SLOT, terms + SLOT, num_stages=STAGES):
        value = _feature(table, j - SLOT, b, tokens, columns, mask, F, FLOAT8, ALIGN, UNIT)
        if SCALED:
            value = value * tl.load(scales + (j * tl.num_programs(1) + b) * N + n)
        total += (
            _coefficient(
                gates,
                gate_index,
                weights,
                j,
                b,
                frame,
                columns,
                inside,
                gate_row,
                gate_batch,
                gate_frame,
                gate_count,
                flag,
                GATE,
                PACKED,
                WEIGHTED,
                ALIGN,
                UNIT,
            )
            * value
        )
    rounded = total.to(out.dtype.element_ty)
    if WRITE:
        tl.store(out + (b * N + n) * D + columns[None, :], rounded, mask=mask)
    if REFERENCE:
        other = tl.load(
            tl.multiple_of(reference + b * reference_batch * UNIT, ALIGN)
            + n * reference_token * UNIT
            + columns[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        newest = tl.where(mask, newest, 0.0)
        where = errors + (b * N + n) * 3
        tl.store(where, tl.sum(tl.abs(newest - other)))
        tl.store(where + 1, tl.sum(tl.abs(newest)))
        tl.store(where + 2, tl.sum(tl.abs(other)))
    if NORM > 0:
        row = n
        if ROW_SLOTS:
            row = tl.load(row_slots + b * N + n).to(tl.int64)
            bad = (row >= row_count) | (row < -1)
            tl.atomic_or(flag, BAD_SLOT, mask=bad)
            row = tl.where(bad, -1, row)
        if row >= 0:
            y = rounded.to(tl.float32)
            if NORM == 1:
                y = tl.where(mask, y - tl.sum(y) / D, 0.0)
            if NORM <= 2:
                y = y * tl.rsqrt(tl.sum(y * y) / D + eps)
            if NORM_WEIGHT:
                y = y * tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            if NORM_BIAS:
                y = y + tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SCALE > 0:
                y = y * (
                    1.0
                    + _modulator(
                        scale,
                        b,
                        n // scale_tokens,
                        columns,
                        mask,
                        scale_batch,
                        scale_frame,
                        SCALE,
                        ALIGN,
                        UNIT,
                    )
                )
            if SHIFT > 0:
                y = y + _modulator(
                    shift, b, n // shift_tokens, columns, mask, shift_batch, shift_frame, SHIFT, ALIGN, UNIT
                )
            tl.store(h + (b * row_count + row) * D + columns[None, :], y.to(h.dtype.element_ty), mask=mask)
