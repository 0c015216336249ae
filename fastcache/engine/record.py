"""What a session measured: time, operators and bytes by step kind."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class StepKindSummary:
    """count: steps of this kind; median_ms of one; ops: operators dispatched by one, views excluded (None:
    not counted).
    """

    count: int
    median_ms: float
    ops: int | None


@dataclass(frozen=True)
class Summary:
    """What a session did. Times are of the model's forward alone.

    measured_speedup: median full step x steps / total time, both of this session; ideal_speedup:
    uncached FLOPs / planned FLOPs. bytes_held: most bytes of stored features at any time.
    recomputed: steps that were computed in full because stored features did not fit.
    """

    policy: str
    backend: str
    steps: dict[str, StepKindSummary]
    total_ms: float
    generations: int
    bytes_held: int
    table_bytes: int
    ideal_speedup: float
    recomputed: int

    @property
    def measured_speedup(self) -> float | None:
        """None if no full step was timed."""
        full = self.steps.get("full")
        count = sum(kind.count for kind in self.steps.values())
        return full.median_ms * count / self.total_ms if full and self.total_ms else None

    @property
    def quotient(self) -> float | None:
        """Measured over ideal speedup: 1 means that cached work costs what its FLOPs cost."""
        return None if self.measured_speedup is None else self.measured_speedup / self.ideal_speedup

    def __str__(self) -> str:
        lines = [
            f"{self.policy}: {self.generations} generation(s), {self.total_ms / 1e3:.2f} s in the model,"
            f" backend {self.backend}"
        ]
        lines += [
            f"  {kind:<8} {row.count:>5} steps  {row.median_ms:>9.2f} ms "
            f" {'-' if row.ops is None else row.ops:>6} ops"
            for kind, row in self.steps.items()
        ]
        measured = (
            "-"
            if self.measured_speedup is None
            else (
                f"{self.measured_speedup:.2f}x measured (against this session's full steps),"
                f" {self.quotient:.2f} of ideal"
            )
        )
        lines.append(f"  speedup  {self.ideal_speedup:.2f}x ideal, {measured}")
        lines.append(
            f"  memory   {self.bytes_held / 1e6:.1f} MB of features, {self.table_bytes / 1e6:.1f} MB of"
            " modulation tables"
        )
        if self.recomputed:
            lines.append(
                f"  note     {self.recomputed} step(s) recomputed because no stored feature fitted (first"
                " use, or the shape changed)"
            )
        return "\n".join(lines)


@dataclass
class Recorder:
    """Collects step times without synchronising: events on a GPU, the clock on a CPU."""

    times: dict[str, list] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    counted_times: dict[str, list] = field(default_factory=dict)  # slowed by counting
    bytes_held: int = 0
    table_bytes: int = 0
    recomputed: int = 0
    generations: int = 0
    counted_refreshing: set[str] = field(default_factory=set)

    def is_new(self, kind: str, refreshes: bool) -> bool:
        """True if operators of this kind are to be counted now: at its first step, and again at the first
        that recomputes tokens.
        """
        if refreshes and kind not in self.counted_refreshing:
            self.counted_refreshing.add(kind)
            return True
        return kind not in self.ops

    def start(self, device: torch.device) -> object:
        """A mark in time on the device."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def stop(self, kind: str, begun: object, device: torch.device, counted: int | None) -> None:
        """Store the time since `begun` under a step kind, with the operators if they were counted."""
        span = (begun, self.start(device))
        if counted is None:
            self.times.setdefault(kind, []).append(span)
        else:
            self.ops[kind] = counted
            self.counted_times.setdefault(kind, []).append(span)

    def summary(self, policy: str, backend: str, ideal_speedup: float) -> Summary:
        """Read the clocks (synchronises a GPU) and sum up."""
        steps, total = {}, 0.0
        for kind in dict.fromkeys((*self.counted_times, *self.times)):
            spans = [_milliseconds(span) for span in self.times.get(kind, [])]
            slowed = [_milliseconds(span) for span in self.counted_times.get(kind, [])]
            median = statistics.median(spans or slowed)
            steps[kind] = StepKindSummary(len(spans) + len(slowed), median, self.ops.get(kind))
            total += sum(spans) + (median * len(slowed) if spans else sum(slowed))
        return Summary(
            policy,
            backend,
            steps,
            total,
            self.generations,
            self.bytes_held,
            self.table_bytes,
            ideal_speedup,
            self.recomputed,
        )


class OperatorCount(TorchDispatchMode):
    """Counts dispatched operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view
        return func(*args, **(kwargs or {}))


def _milliseconds(span: tuple) -> float:
    begun, ended = span
    if isinstance(begun, torch.cuda.Event):
        ended.synchronize()
        return begun.elapsed_time(ended)
    return (ended - begun) * 1e3
