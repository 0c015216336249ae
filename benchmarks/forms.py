"""One case: memory guard, rotating buffers, values, times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import Case
from benchmarks.correctness import Reference
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.machine import free_bytes, last_level_cache_bytes
from benchmarks.providers import Binder, Call, Provider, binder
from benchmarks.timing import Effort, Timing, measure

MAX_COPIES = 64
COLD = 2  # last-level caches that the rotating buffers must exceed
WORKING_TENSORS = (
    16  # float32 tensors [B, N, D] that the eager definition and the float64 check may hold at once
)


class NotMeasured(Exception):
    """A case or a contender that could not be measured, and why."""


@dataclass(frozen=True)
class Absence:
    """What a report says of it. provider None: the whole case."""

    case: str
    provider: str | None
    reason: str


@dataclass(frozen=True)
class Row:
    """One contender of one case. vs_*: times faster than that contender (its median over ours), None if it is absent.

    bytes: the least that the form moves, so gbps is what a perfect implementation would have
    needed in this time; share_of_copy: gbps over the copy bandwidth of the run. cache: cold if the
    rotating buffers exceed twice the last-level cache. error: relative RMS against float64.
    """

    case: str
    form: str
    size: str
    dtype: str
    provider: str
    threads: int
    bytes: int
    cache: str
    buffers: int
    timing: Timing
    gbps: float
    error: float
    vs_naive: float | None
    vs_best_eager: float | None
    vs_compile: float | None
    share_of_copy: float | None = None

    def against(self, copy_gbps: float) -> "Row":
        """The row with its share of the copy bandwidth."""
        return replace(self, share_of_copy=self.gbps / copy_gbps)


@dataclass(frozen=True)
class Measured:
    """What became of a case."""

    rows: tuple[Row, ...]
    absent: tuple[Absence, ...]


class Prepared:
    """The buffers of a case. Raises NotMeasured if they do not fit into memory."""

    def __init__(
        self, case: Case, device: torch.device, max_copies: int = MAX_COPIES, free: int | None = None
    ) -> None:
        self.case, self.device = case, device
        cache = last_level_cache_bytes(device)
        needed = max(1, -(-COLD * cache // max(1, input_bytes(case))))
        copies = min(needed, max_copies)
        free = free_bytes(device) if free is None else free
        need = copies * input_bytes(case) + 4 * WORKING_TENSORS * case.size.elements
        if free is not None and need > free:
            raise NotMeasured(f"needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        self.cache = "cold" if copies == needed else "warm"
        self.buffers: list[Inputs] = [make_inputs(case, device, seed) for seed in range(copies)]
        self._reference = Reference(case, self.buffers[0])

    def bound(self, provider: Provider, inductor: str = "inductor") -> tuple[list[Call], float]:
        """(the call on every buffer, its error). Raises WrongValues, or NotMeasured if the contender cannot run here."""
        return self.bound_by(
            provider.value, binder(provider, self.case.form, inductor), may_fail=provider is Provider.COMPILED
        )

    def bound_by(self, name: str, bind: Binder, *, may_fail: bool) -> tuple[list[Call], float]:
        """The same for any binder. may_fail: an error of the first call means that it cannot run here."""
        try:
            calls = [bind(inputs) for inputs in self.buffers]
            if may_fail:
                calls[0]()
        except Exception as failure:
            if not may_fail:
                raise
            raise NotMeasured(compile_failure(failure)) from failure
        return calls, self._reference.check(name, calls[0])


def input_bytes(case: Case) -> int:
    """Bytes of the operands of one call, rows [B, K, D] counted as whole tensors."""
    return case.tensor_bytes * (1 + case.terms + 2 * case.form.writes_slot)


def compile_failure(failure: Exception) -> str:
    """Why torch.compile does not run here, in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"


def measure_case(
    case: Case,
    device: torch.device,
    effort: Effort,
    providers: Sequence[Provider] = tuple(Provider),
    max_copies: int = MAX_COPIES,
) -> Measured:
    """Check and time every provider of a case, on the same buffers, in turns."""
    try:
        prepared = Prepared(case, device, max_copies)
    except NotMeasured as reason:
        return Measured((), (Absence(case.name, None, str(reason)),))
    calls, errors, absent = {}, {}, []
    for provider in providers:
        try:
            calls[provider], errors[provider] = prepared.bound(provider)
        except NotMeasured as reason:
            absent.append(Absence(case.name, provider.value, str(reason)))
    timings = measure(calls, effort, device)
    return Measured(
        tuple(_row(prepared, provider, timings, errors[provider]) for provider in calls), tuple(absent)
    )


def _row(prepared: Prepared, provider: Provider, timings: dict[Provider, Timing], error: float) -> Row:
    case, own = prepared.case, timings[provider]
    ratio: Callable[[Provider], float | None] = lambda other: (
        timings[other].median_us / own.median_us if other in timings else None
    )  # noqa: E731
    return Row(
        case=case.name,
        form=case.form.value,
        size=case.size.name,
        dtype=case.dtype_name,
        provider=provider.value,
        threads=torch.get_num_threads(),
        bytes=case.min_bytes,
        cache=prepared.cache,
        buffers=len(prepared.buffers),
        timing=own,
        gbps=gbps(case, own),
        error=error,
        vs_naive=ratio(Provider.NAIVE),
        vs_best_eager=ratio(Provider.BEST_EAGER),
        vs_compile=ratio(Provider.COMPILED),
    )


def gbps(case: Case, timing: Timing) -> float:
    """1e9 bytes per second, of the bytes that the form moves at least."""
    return 1e-3 * case.min_bytes / timing.median_us
