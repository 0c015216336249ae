"""Checks every operator and backend of this machine against the definition in float64."""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache import backends
from fastcache.backends import eager
from fastcache.ops import Norm, residual_update, residual_update_scatter_, slot_map

B, N, D, TERMS, ROWS = 2, 96, 328, 5, 37  # D: no multiple of a 512-bit vector of any dtype
ALLOWED_RATIO = 1.1  # RMS error against float64, over that of the eager definition


@dataclass(frozen=True)
class Verdict:
    """One check. ratio: RMS error of the backend over that of the definition, both against float64."""

    operator: str
    form: str
    backend: str
    dtype: str
    ratio: float
    passed: bool
    error: str = ""


def verify(device: torch.device) -> Iterator[Verdict]:
    """Run every form of every operator on every backend that can run on `device`."""
    names = [name for name in backends.ORDER.get(device.type, ("eager",)) if backends.status()[name].available]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for form, (operator, build) in FORMS.items():
            wide = _outputs(operator, build(dtype, device, True), "eager")
            baseline = _rms(_outputs(operator, build(dtype, device, False), "eager"), wide)
            for name in names:
                short = str(dtype).removeprefix("torch.")
                try:
                    found = _rms(_outputs(operator, build(dtype, device, False), name), wide)
                except Exception as error:  # a verdict, not a crash: doctor shows all of them
                    yield Verdict(operator.__name__, form, name, short, float("nan"), False, str(error))
                    continue
                ratio = found / baseline if baseline else 1.0 + found
                yield Verdict(operator.__name__, form, name, short, ratio, ratio <= ALLOWED_RATIO)


def _outputs(operator: Callable, arguments: dict, backend: str) -> list[Tensor]:
    with backends.use_backend(backend), torch.no_grad():
        result = operator(**arguments)
    written = [arguments["slot"]] if "slot" in arguments else []
    return [tensor for tensor in (*result, *written) if tensor is not None]


def _rms(found: list[Tensor], wide: list[Tensor]) -> float:
    """RMS error relative to the reference's own RMS, over all outputs together."""
    error = sum(float((a.double() - b.double()).square().sum() / b.double().square().mean().clamp(min=1e-30)) for a, b in zip(found, wide, strict=True))
    return (error / sum(b.numel() for b in wide)) ** 0.5


def _random(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, wide: bool) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (values.double() if wide else values).to(device)


def _update(dtype: torch.dtype, device: torch.device, wide: bool, **more: object) -> dict:
    make = lambda seed, *shape: _random(seed, shape, dtype, device, wide)  # noqa: E731
    index = torch.tensor([4, -1, 0, 2, 5], dtype=torch.int32, device=device)
    arguments = dict(x=make(0, B, N, D), features=[make(10 + j, B, N, D) for j in range(TERMS)], gates=make(1, 6, B, D), gate_index=index)
    return {**arguments, **more}


def _sum(dtype, device, wide):
    return _update(dtype, device, wide)


def _weighted(dtype, device, wide):
    return _update(dtype, device, wide, weights=torch.linspace(-1, 2, TERMS, device=device))


def _per_token_gates(dtype, device, wide):
    arguments = _update(dtype, device, wide)
    return {**arguments, "gates": _random(1, (B, N, D), dtype, device, wide), "gate_index": None}


def _layer_norm(dtype, device, wide):
    shift, scale = (_random(seed, (B, D), dtype, device, wide) for seed in (2, 3))
    return _update(dtype, device, wide, norm=Norm.LAYER, shift=shift, scale=scale)


def _rms_norm(dtype, device, wide):
    return _update(dtype, device, wide, norm=Norm.RMS, scale=_random(3, (B, D), dtype, device, wide))


def _rows(dtype, device, wide):
    return {**_layer_norm(dtype, device, wide), "row_slots": _slots(device), "row_count": ROWS}


def _errors(dtype, device, wide):
    return _update(dtype, device, wide, reference=_random(7, (B, N, D), dtype, device, wide), need_x=False)


def _store(dtype, device, wide):
    return {**_scattered(dtype, device, wide), "fresh": _random(5, (B, N, D), dtype, device, wide), "fresh_slots": None}


def _scattered(dtype, device, wide):
    arguments = _update(dtype, device, wide)
    arguments["gate_index"] = torch.tensor([4, -1, 0, 2, 5, 1], dtype=torch.int32, device=device)
    return {**arguments, "slot": _random(4, (B, N, D), dtype, device, wide), "fresh": _random(5, (B, ROWS, D), dtype, device, wide), "fresh_slots": _slots(device), "position": 2}


def _slots(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    index = torch.stack([torch.randperm(N, generator=generator)[:ROWS] for _ in range(B)])
    return slot_map(index, N).slots.to(device)


FORMS = {
    "sum of 5 gated terms": (residual_update, _sum),
    "weighted sum": (residual_update, _weighted),
    "gates per token": (residual_update, _per_token_gates),
    "LayerNorm and modulate": (residual_update, _layer_norm),
    "RMSNorm and modulate": (residual_update, _rms_norm),
    "modulate selected rows": (residual_update, _rows),
    "error sums": (residual_update, _errors),
    "store all rows": (residual_update_scatter_, _store),
    "refresh selected rows": (residual_update_scatter_, _scattered),
}
