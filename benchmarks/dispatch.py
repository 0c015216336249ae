"""What a call costs before it moves any bytes: one term on 256 elements, and the same without FastCache."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from benchmarks.machine import threads
from benchmarks.timing import Effort, Timing, measure
from fastcache.ops import residual_update

CALLS = 100  # in one sample: shorter than the time slice that another process may take
# what autograd is asked to do; no input requires a gradient
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@dataclass(frozen=True)
class DispatchRow:
    """Microseconds of one call."""

    call: str
    mode: str
    timing: Timing


def measure_dispatch(device: torch.device, effort: Effort, calls: int = CALLS) -> tuple[DispatchRow, ...]:
    """x + g * f for x [1, 4, 64] float32, in every mode, on one thread."""
    rows = []
    with threads(1) if device.type == "cpu" else nullcontext():
        for mode, context in MODES.items():
            with context():
                contenders = {name: [call] for name, call in tiny_calls(device).items()}
                found = measure(contenders, effort, device, calls)
            rows += [DispatchRow(name, mode, timing) for name, timing in found.items()]
    return tuple(rows)


def tiny_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The same update by the public function, the registered operator, and plain PyTorch."""
    x, feature = torch.randn(1, 4, 64, device=device), torch.randn(1, 4, 64, device=device)
    gate = torch.randn(1, 64, device=device)
    column, features, registered = gate[:, None], [feature], torch.ops.fastcache.residual_update
    return {
        "fastcache.ops.residual_update": lambda: residual_update(x, feature, gate),
        "torch.ops.fastcache.residual_update": lambda: registered(x, features, gate),
        "torch.addcmul": lambda: torch.addcmul(x, column, feature),
        "x + g * f": lambda: x + column * feature,
    }
