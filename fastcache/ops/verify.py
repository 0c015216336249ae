"""Checks every operator and backend of this machine against the definition in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache import backends
from fastcache.ops import (
    Norm,
    attention_received,
    relative_error,
    residual_update,
    residual_update_scatter_,
    row_score,
    select_tokens_,
    slot_map,
    value_norm,
)

B, N, D, TERMS, ROWS = 2, 96, 328, 5, 37  # D: no multiple of a 512-bit vector of any dtype
HEADS, HEAD = 3, 72
Arguments = dict[str, Any]
ALLOWED_RATIO = 1.1  # RMS error against float64, over that of the eager definition
APPROXIMATE_RATIO = 3.0  # where a kernel uses the exponential of the hardware, 2 units in the last place


@dataclass(frozen=True)
class Verdict:
    """One check. ratio: RMS error of the backend over that of the definition, both against float64."""

    operator: str
    form: str
    backend: str
    dtype: str
    ratio: float
    allowed: float  # the largest ratio that passes
    passed: bool
    error: str = ""


@dataclass(frozen=True)
class Form:
    """A call of an operator: its arguments by dtype and device, in float64 if `wide`."""

    operator: Callable[..., Any]
    build: Callable[[torch.dtype, torch.device, bool], Arguments]
    allowed: float = ALLOWED_RATIO


def verify(device: torch.device) -> Iterator[Verdict]:
    """Run every form of every operator on every backend of `device` that has it."""
    names = [
        name for name in backends.ORDER.get(device.type, ("eager",)) if backends.status()[name].available
    ]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for title, form in FORMS.items():
            operator = form.operator.__name__
            wide = _outputs(form.operator, form.build(dtype, device, True), "eager")
            baseline = _rms(_outputs(form.operator, form.build(dtype, device, False), "eager"), wide)
            for name in names:
                if operator not in backends.IMPLEMENTS[name]:
                    continue
                short = str(dtype).removeprefix("torch.")
                try:
                    found = _rms(_outputs(form.operator, form.build(dtype, device, False), name), wide)
                except Exception as error:  # a verdict, not a crash: doctor shows all of them
                    yield Verdict(operator, title, name, short, float("nan"), form.allowed, False, str(error))
                    continue
                ratio = found / baseline if baseline else 1.0 + found
                yield Verdict(operator, title, name, short, ratio, form.allowed, ratio <= form.allowed)


def _outputs(operator: Callable[..., Any], arguments: Arguments, backend: str) -> list[Tensor]:
    with backends.use_backend(backend), torch.no_grad():
        result = operator(**arguments)
    results = (result,) if isinstance(result, Tensor) else result
    written = [arguments[name] for name in ("slot", "age") if name in arguments]
    return [tensor for tensor in (*results, *written) if tensor is not None]


def _rms(found: list[Tensor], wide: list[Tensor]) -> float:
    """RMS error relative to the reference's own RMS, over all outputs together."""
    error = sum(
        float((a.double() - b.double()).square().sum() / b.double().square().mean().clamp(min=1e-30))
        for a, b in zip(found, wide, strict=True)
    )
    return (error / sum(b.numel() for b in wide)) ** 0.5


def _random(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, wide: bool
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (values.double() if wide else values).to(device)


def _update(dtype: torch.dtype, device: torch.device, wide: bool, **more: object) -> Arguments:
    def make(seed: int, *shape: int) -> Tensor:
        return _random(seed, shape, dtype, device, wide)

    index = torch.tensor([4, -1, 0, 2, 5], dtype=torch.int32, device=device)
    arguments = dict(
        x=make(0, B, N, D),
        features=[make(10 + j, B, N, D) for j in range(TERMS)],
        gates=make(1, 6, B, D),
        gate_index=index,
    )
    return {**arguments, **more}


def _sum(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return _update(dtype, device, wide)


def _weighted(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return _update(dtype, device, wide, weights=torch.linspace(-1, 2, TERMS, device=device))


def _per_token_gates(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    arguments = _update(dtype, device, wide)
    return {**arguments, "gates": _random(1, (B, N, D), dtype, device, wide), "gate_index": None}


def _layer_norm(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    shift, scale = (_random(seed, (B, D), dtype, device, wide) for seed in (2, 3))
    return _update(dtype, device, wide, norm=Norm.LAYER, shift=shift, scale=scale)


def _rms_norm(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return _update(dtype, device, wide, norm=Norm.RMS, scale=_random(3, (B, D), dtype, device, wide))


def _rows(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return {**_layer_norm(dtype, device, wide), "row_slots": _slots(device), "row_count": ROWS}


def _errors(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return _update(dtype, device, wide, reference=_random(7, (B, N, D), dtype, device, wide), need_x=False)


def _store(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return {
        **_scattered(dtype, device, wide),
        "fresh": _random(5, (B, N, D), dtype, device, wide),
        "fresh_slots": None,
    }


def _scattered(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    arguments = _update(dtype, device, wide)
    arguments["gate_index"] = torch.tensor([4, -1, 0, 2, 5, 1], dtype=torch.int32, device=device)
    return {
        **arguments,
        "slot": _random(4, (B, N, D), dtype, device, wide),
        "fresh": _random(5, (B, ROWS, D), dtype, device, wide),
        "fresh_slots": _slots(device),
        "position": 2,
    }


def _slots(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    index = torch.stack([torch.randperm(N, generator=generator)[:ROWS] for _ in range(B)])
    return slot_map(index, N).slots.to(device)


def _selection(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    """Scores that are far apart, in a random order: float32 and float64 must choose the same tokens."""
    order = torch.stack(
        [torch.randperm(4 * N, generator=torch.Generator().manual_seed(row)) for row in range(B)]
    )
    age = torch.arange(4 * N, dtype=torch.int32, device=device).remainder(3).expand(B, -1).contiguous()
    counts = torch.tensor([ROWS, 3 * N], dtype=torch.int32, device=device)
    return dict(
        score=order.to(device, torch.float64 if wide else torch.float32),
        age=age,
        counts=counts,
        capacity=3 * N,
        age_weight=64.25,
        normalize=False,
        width=16,
        cell=2,
        bonus=0.75,
    )


def _norms(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return dict(x=_random(0, (B, N, D), dtype, device, wide))


def _distances(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return dict(
        x=_random(0, (B, N, D), dtype, device, wide), reference=_random(1, (B, N, D), dtype, device, wide)
    )


def _values(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return dict(v=_random(0, (B, HEADS, N, HEAD), dtype, device, wide))


def _attention(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    return dict(
        q=_random(0, (B, HEADS, N, HEAD), dtype, device, wide),
        k=_random(1, (B, HEADS, ROWS, HEAD), dtype, device, wide),
    )


def _attention_with_sums(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    arguments = _attention(dtype, device, wide)
    logits = torch.matmul(arguments["q"].double(), arguments["k"].double().transpose(-1, -2)) * HEAD**-0.5
    return {**arguments, "lse": logits.logsumexp(-1).to(torch.float64 if wide else torch.float32)}


def _calibration(dtype: torch.dtype, device: torch.device, wide: bool) -> Arguments:
    def make(seed: int, count: int) -> list[Tensor]:
        return [_random(seed + j, (B, N, D), dtype, device, wide) for j in range(count)]

    return dict(newest=make(0, 4), earlier=make(100, 12))


FORMS = {
    "sum of 5 gated terms": Form(residual_update, _sum),
    "weighted sum": Form(residual_update, _weighted),
    "gates per token": Form(residual_update, _per_token_gates),
    "LayerNorm and modulate": Form(residual_update, _layer_norm),
    "RMSNorm and modulate": Form(residual_update, _rms_norm),
    "modulate selected rows": Form(residual_update, _rows),
    "error sums": Form(residual_update, _errors),
    "store all rows": Form(residual_update_scatter_, _store),
    "refresh selected rows": Form(residual_update_scatter_, _scattered),
    "select tokens": Form(select_tokens_, _selection),
    "norm of tokens": Form(row_score, _norms),
    "distance of tokens": Form(row_score, _distances),
    "norm of values": Form(value_norm, _values),
    "attention received": Form(attention_received, _attention, APPROXIMATE_RATIO),
    "attention received, sums given": Form(attention_received, _attention_with_sums, APPROXIMATE_RATIO),
    "errors of calibration": Form(relative_error, _calibration),
}
