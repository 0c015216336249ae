"""Medians of contenders that take turns, so that whatever slows the machine slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over `rounds` samples."""

    median_us: float
    p10_us: float
    p90_us: float
    best_us: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """From samples in seconds."""
        ordered = sorted(1e6 * sample for sample in seconds)
        tenth = (len(ordered) - 1) / 10
        return cls(
            statistics.median(ordered),
            ordered[round(tenth)],
            ordered[round(9 * tenth)],
            ordered[0],
            len(ordered),
        )


@dataclass(frozen=True)
class Effort:
    """How long to measure: until `seconds` are over, but at least and at most so many rounds."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 200


Buffers = Sequence[Callable[[], object]]  # the same call on different buffers


def measure(
    contenders: Mapping[str, Buffers], effort: Effort, device: torch.device, calls: int = 1
) -> dict[str, Timing]:
    """Time every contender once a round, after one round to warm up; a sample is `calls` calls.

    Each call of any contender uses the next buffer, so that none finds its operands in a cache
    where another left them.
    """
    clock = _elapsed_cuda if device.type == "cuda" else _elapsed
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    turn, begun = 0, None
    with _no_collection():
        while begun is None or _goes_on(
            len(next(iter(samples.values()))), time.perf_counter() - begun, effort
        ):
            for name, buffers in contenders.items():
                sample = clock(buffers[turn % len(buffers)], calls)
                turn += 1
                if begun is not None:
                    samples[name].append(sample / calls)
            begun = time.perf_counter() if begun is None else begun
    return {name: Timing.of(found) for name, found in samples.items()}


def _goes_on(rounds: int, seconds: float, effort: Effort) -> bool:
    return rounds < effort.min_rounds or (seconds < effort.seconds and rounds < effort.max_rounds)


def _elapsed(call: Callable[[], object], calls: int) -> float:
    """Seconds of `calls` calls on a device that the host waits for; freeing the last result is not counted."""
    begun = time.perf_counter()
    for _ in range(calls):
        result = call()
    seconds = time.perf_counter() - begun
    del result
    return seconds


def _elapsed_cuda(call: Callable[[], object], calls: int) -> float:
    """Seconds between two events on the current stream, launch gaps included."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(calls):
        result = call()
    after.record()
    after.synchronize()
    del result
    return before.elapsed_time(after) / 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection between two readings of the clock."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
