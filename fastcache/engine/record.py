"""What a session measured: time, operators and bytes by step kind. Two generations are kept, no more."""

import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KEPT = 2  # generations whose times are kept
MOST = 4096  # calls of a kind in one generation, if a sampler never ends it


@dataclass(frozen=True)
class StepKindSummary:
    """count: calls of this kind so far; median_ms of one, in the last generations; ops: operators dispatched
    by one, views excluded (None: not counted).
    """

    count: int
    median_ms: float
    ops: int | None


@dataclass(frozen=True)
class Summary:
    """What a session did. Times are of the model's forward alone, in the last two generations.

    measured_speedup: median full step x steps / total time, both of this session; ideal_speedup:
    uncached FLOPs / planned FLOPs. timed: model calls in total_ms. bytes_held: most bytes of stored
    features at any time. recomputed: steps that were computed in full because stored features did not
    fit. restarted: generations that were given up (t went back to its start). unproven:
    structures of blocks whose gates were zero, so that nothing could be proven of them.
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
    timed: int = 0
    restarted: int = 0
    unproven: int = 0

    @property
    def measured_speedup(self) -> float | None:
        """None if no full step was timed."""
        full = self.steps.get("full")
        return full.median_ms * self.timed / self.total_ms if full and self.total_ms else None

    @property
    def quotient(self) -> float | None:
        """Measured over ideal speedup: 1 means that cached work costs what its FLOPs cost."""
        return None if self.measured_speedup is None else self.measured_speedup / self.ideal_speedup

    def __str__(self) -> str:
        lines = [
            f"{self.policy}: {self.generations} generation(s), {self.total_ms / 1e3:.2f} s in the model in"
            f" {self.timed} timed calls, backend {self.backend}"
        ]
        lines += [
            f"  {kind:<8} {row.count:>5} calls  {row.median_ms:>9.2f} ms "
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
        if self.restarted:
            lines.append(f"  note     {self.restarted} generation(s) given up, t went back to its start")
        if self.unproven:
            lines.append(f"  note     {self.unproven} kind(s) of block unproven: their gates are zero")
        return "\n".join(lines)


@dataclass
class Generation:
    """Spans of the calls of one generation, by step kind; those slowed by counting apart."""

    times: dict[str, deque[Any]] = field(default_factory=dict)
    counted: dict[str, deque[Any]] = field(default_factory=dict)


class Recorder:
    """Collects step times without synchronising: events on a GPU, the clock on a CPU."""

    def __init__(self) -> None:
        self._kept: deque[Generation] = deque([Generation()], maxlen=KEPT)
        self._counts: Counter[str] = Counter()
        self._ops: dict[str, int] = {}
        self._counted_refreshing: set[str] = set()
        self.bytes_held = 0
        self.table_bytes = 0
        self.recomputed = 0

    def begin(self) -> None:
        """A generation begins: of those before, the last one is kept."""
        if self._kept[-1].times or self._kept[-1].counted:
            self._kept.append(Generation())

    def is_new(self, kind: str, refreshes: bool) -> bool:
        """True if operators of this kind are to be counted now: at its first step, and again at the first
        that recomputes tokens.
        """
        if refreshes and kind not in self._counted_refreshing:
            self._counted_refreshing.add(kind)
            return True
        return kind not in self._ops

    def start(self, device: torch.device) -> object:
        """A mark in time on the device; None while a CUDA graph is captured, where there is none."""
        if device.type != "cuda":
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, kind: str, begun: object, device: torch.device, counted: int | None) -> None:
        """Store the time since `begun` under a step kind, with the operators if they were counted."""
        self._counts[kind] += 1
        if counted is not None:
            self._ops[kind] = counted
        ended = None if begun is None else self.start(device)
        if ended is not None:
            generation = self._kept[-1]
            spans = generation.times if counted is None else generation.counted
            spans.setdefault(kind, deque(maxlen=MOST)).append((begun, ended))

    def summary(
        self, policy: str, backend: str, ideal_speedup: float, generations: int, restarted: int, unproven: int
    ) -> Summary:
        """Read the clocks (synchronises a GPU) and sum up."""
        steps, total, timed = {}, 0.0, 0
        for kind, count in self._counts.items():
            spans = [_milliseconds(span) for kept in self._kept for span in kept.times.get(kind, [])]
            slowed = [_milliseconds(span) for kept in self._kept for span in kept.counted.get(kind, [])]
            median = statistics.median(spans or slowed) if spans or slowed else float("nan")
            steps[kind] = StepKindSummary(count, median, self._ops.get(kind))
            total += sum(spans) + (median * len(slowed) if spans else sum(slowed))
            timed += len(spans) + len(slowed)
        return Summary(
            policy,
            backend,
            steps,
            total,
            generations,
            self.bytes_held,
            self.table_bytes,
            ideal_speedup,
            self.recomputed,
            timed,
            restarted,
            unproven,
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


def _milliseconds(span: tuple[Any, ...]) -> float:
    begun, ended = span
    if isinstance(begun, torch.cuda.Event):
        ended.synchronize()
        return begun.elapsed_time(ended)
    return (ended - begun) * 1e3
