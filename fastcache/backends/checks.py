"""Argument checks of the operator family, shared by the eager backend and the fake kernels.

Each check names the argument, what was expected and what came. Shapes only, so that they run on
fake tensors; values (slot and gate indices) are checked by the CPU kernels and by `slot_range`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NO_NORM, LAYER, RMS, IDENTITY = 0, 1, 2, 3
MAX_TERMS = 1024
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def residual_update(
    x: Tensor,
    features: Sequence[Tensor],
    gates: Tensor | None,
    gate_index: Tensor | None,
    weights: Tensor | None,
    scales: Tensor | None,
    norm: int,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    row_slots: Tensor | None,
    row_count: int,
    reference: Tensor | None,
) -> None:
    """Raise ValueError or TypeError if the arguments of `residual_update` do not fit together."""
    _stream(x)
    _terms(x, features, len(features), gates, gate_index, weights, scales)
    _epilogues(x, norm, shift, scale, norm_weight, norm_bias, row_slots, row_count, reference)
    _require(reference is None or len(features) > 0, "reference: needs at least one feature to compare with")


def residual_update_scatter(
    x: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_slots: Tensor | None,
    features: Sequence[Tensor],
    position: int,
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
    row_slots: Tensor | None,
    row_count: int,
    reference: Tensor | None,
) -> None:
    """Raise ValueError or TypeError if the arguments of `residual_update_scatter_` do not fit."""
    _stream(x)
    _terms(x, features, len(features) + 1, gates, gate_index, weights, scales)
    _epilogues(x, norm, shift, scale, norm_weight, norm_bias, row_slots, row_count, reference)
    _require(-1 <= position <= len(features), f"position: expected -1..{len(features)}, got {position}")
    _shape("slot", slot, tuple(x.shape))
    _device("slot", slot, x)
    B, N, D = x.shape
    _require(
        fresh.ndim == 3 and fresh.shape[0] == B and fresh.shape[2] == D,
        f"fresh: expected [{B}, K, {D}], got {list(fresh.shape)}",
    )
    _device("fresh", fresh, x)
    _unit_stride("fresh", fresh)
    _unit_stride("slot", slot)
    _require(
        fresh.dtype in FLOATS,
        f"fresh: expected float32, float16, bfloat16 or float64, got {fresh.dtype}",
        TypeError,
    )
    shared = [d for d in range(3) if slot.shape[d] > 1 and slot.stride(d) == 0 and slot.numel() > 0]
    _require(
        not shared, f"slot: is written, so its rows must not share memory, got strides {list(slot.stride())}"
    )
    if fresh_slots is None:
        _require(
            fresh.shape[1] == N,
            f"fresh: expected [{B}, {N}, {D}] when fresh_slots is None, got {list(fresh.shape)}",
        )
    else:
        slot_range("fresh_slots", fresh_slots, x, fresh.shape[1])
    if slot.dtype == torch.float8_e4m3fn:
        _require(
            slot_scale is not None, "slot_scale: a float8 slot needs [B, N] float32 row scales, got None"
        )
    _require(
        slot_scale is None or slot.dtype == torch.float8_e4m3fn,
        f"slot_scale: only a float8_e4m3fn slot has row scales, got slot of {slot.dtype}",
    )
    _require(
        slot.dtype == torch.float8_e4m3fn or slot.dtype in FLOATS,
        f"slot: expected a floating dtype, got {slot.dtype}",
        TypeError,
    )
    if slot_scale is not None:
        _shape("slot_scale", slot_scale, (B, N))
        _dtype("slot_scale", slot_scale, torch.float32)


def slot_range(name: str, slots: Tensor, x: Tensor, count: int) -> None:
    """Slot maps are [B, N] int32 with values in -1 .. count - 1; values are read on a CPU only."""
    _shape(name, slots, tuple(x.shape[:2]))
    _dtype(name, slots, torch.int32)
    _device(name, slots, x)
    if slots.device.type == "cpu" and not _symbolic(slots) and slots.numel():
        low, high = int(slots.min()), int(slots.max())
        _require(
            low >= -1 and high < count,
            f"{name}: expected slots in -1..{count - 1}, got {low}..{high}",
            IndexError,
        )


def _stream(x: Tensor) -> None:
    _require(x.ndim == 3, f"x: expected [B, N, D], got {list(x.shape)}")
    _require(
        x.dtype in FLOATS, f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}", TypeError
    )
    _unit_stride("x", x)


def _terms(
    x: Tensor,
    features: Sequence[Tensor],
    count: int,
    gates: Tensor | None,
    gate_index: Tensor | None,
    weights: Tensor | None,
    scales: Tensor | None,
) -> None:
    _require(count <= MAX_TERMS, f"features: at most {MAX_TERMS} terms in one call, got {count}")
    for j, feature in enumerate(features):
        _shape(f"features[{j}]", feature, tuple(x.shape))
        _require(
            feature.dtype in FLOATS or feature.dtype == torch.float8_e4m3fn,
            f"features[{j}]: expected a floating dtype, got {feature.dtype}",
            TypeError,
        )
        _require(
            feature.dtype == features[0].dtype,
            f"features[{j}]: all features have one dtype, expected {features[0].dtype}, got {feature.dtype}",
            TypeError,
        )
        _device(f"features[{j}]", feature, x)
        _unit_stride(f"features[{j}]", feature)
    if gate_index is not None:
        if gates is None:
            raise ValueError("gates: gate_index was given without gates")
        _shape("gate_index", gate_index, (count,))
        _dtype("gate_index", gate_index, torch.int32)
        _device("gate_index", gate_index, x)
        _require(
            gates.ndim >= 2 and gates.shape[0] > 0,
            f"gates: expected packed [G, *vector] beside gate_index, got {list(gates.shape)}",
        )
        if gate_index.device.type == "cpu" and not _symbolic(gate_index) and count:
            low, high = int(gate_index.min()), int(gate_index.max())
            _require(
                low >= -1 and high < gates.shape[0],
                f"gate_index: expected rows in -1..{gates.shape[0] - 1}, got {low}..{high}",
                IndexError,
            )
    if gates is not None:
        _vector("gates", gates, x, packed=gate_index is not None)
    if weights is not None:
        _shape("weights", weights, (count,))
        _dtype("weights", weights, torch.float32)
        _device("weights", weights, x)
    if scales is not None:
        _shape("scales", scales, (count, x.shape[0], x.shape[1]))
        _dtype("scales", scales, torch.float32)
        _device("scales", scales, x)


def _epilogues(
    x: Tensor,
    norm: int,
    shift: Tensor | None,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    row_slots: Tensor | None,
    row_count: int,
    reference: Tensor | None,
) -> None:
    _require(
        norm in (NO_NORM, LAYER, RMS, IDENTITY),
        f"norm: expected 0 (none), 1 (LayerNorm), 2 (RMSNorm) or 3 (identity), got {norm}",
    )
    for name, vector in (("shift", shift), ("scale", scale)):
        if vector is not None:
            _require(norm != NO_NORM, f"{name}: was given without norm")
            _vector(name, vector, x)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            _require(norm in (LAYER, RMS), f"{name}: was given without a norm to follow")
            _shape(name, vector, (x.shape[2],))
            _vector(name, vector, x)
    _require(row_count >= 0, f"row_count: expected 0 or more, got {row_count}")
    if row_slots is not None:
        _require(norm != NO_NORM, "row_slots: was given without norm")
        slot_range("row_slots", row_slots, x, row_count)
    if reference is not None:
        _shape("reference", reference, tuple(x.shape))
        _require(
            reference.dtype in FLOATS,
            f"reference: expected a floating dtype, got {reference.dtype}",
            TypeError,
        )
        _device("reference", reference, x)
        _unit_stride("reference", reference)


def _vector(name: str, vector: Tensor, x: Tensor, packed: bool = False) -> None:
    B, N, D = x.shape
    shape = tuple(vector.shape[1:]) if packed else tuple(vector.shape)
    fits = len(shape) in (1, 2, 3) and shape[-1] == D
    if fits and len(shape) > 1:
        fits = shape[0] in (1, B)
    if fits and len(shape) == 3:
        fits = shape[1] in (1, N) or (shape[1] > 0 and N % shape[1] == 0)
    if not fits:
        lead = "[G, ...] of " if packed else ""
        _require(
            False,
            f"{name}: expected {lead}[D], [B, D], [B, 1, D], [B, F, D] (F divides N) or [B, N, D] for x"
            f" {list(x.shape)}, got {list(vector.shape)}",
        )
    _require(vector.dtype in FLOATS, f"{name}: expected a floating dtype, got {vector.dtype}", TypeError)
    _device(name, vector, x)
    _unit_stride(name, vector)


def _shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, f"{name}: expected {list(shape)}, got {list(tensor.shape)}")


def _dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    _require(tensor.dtype == dtype, f"{name}: expected {dtype}, got {tensor.dtype}", TypeError)


def _device(name: str, tensor: Tensor, x: Tensor) -> None:
    _require(tensor.device == x.device, f"{name}: expected on {x.device} as x, got {tensor.device}")


def _unit_stride(name: str, tensor: Tensor) -> None:
    _require(
        tensor.shape[-1] <= 1 or tensor.numel() == 0 or tensor.stride(-1) == 1,
        f"{name}: the last dimension must have stride 1 (nothing is copied behind your back; call"
        f" .contiguous()), got strides {list(tensor.stride())}",
    )


def _symbolic(tensor: Tensor) -> bool:
    """True for tensors without values: fake, functional or meta."""
    return torch.compiler.is_compiling() or tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter)


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)
