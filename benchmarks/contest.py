"""One case: memory guard, rotating buffers, values, times. Every contender is checked before it is timed.

A row is one contender of one case, as it is in the JSON:

- bytes: the least that is moved, and gbps: what a perfect implementation would have needed in this time;
- share_of_copy: gbps over the copy bandwidth of the run; cache: cold if the rotating buffers exceed twice the
  last-level cache; rows: K, tokens that are refreshed;
- error: relative RMS, or share of tokens chosen otherwise; operators: that a call dispatches, views excluded;
- vs_*: times faster than that contender (its median over ours); cpu_vs_naive: as vs_naive, of CPU time;
- beside_us: of a block, the time without that of its MLP.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import DTYPE_NAMES, Case, ChoiceCase
from benchmarks.machine import free_bytes, last_level_cache_bytes
from benchmarks.sequences import COMPARED, COMPILED, MLP_ALONE, NAIVE, Binder, Call, FormSequences, Sequences
from benchmarks.timing import Effort, Timing, measure
from benchmarks.tokens import ChoiceSequences, OperatorCase, OperatorSequences
from fastcache.engine.record import OperatorCount

MAX_COPIES = 64
COLD = 2  # last-level caches that the rotating buffers must exceed
MOST_FLOPS = 6e10  # of a block on a CPU: beyond, one call takes seconds

AnyCase = Case | ChoiceCase | OperatorCase
Row = dict[str, object]


class NotMeasured(Exception):
    """A case or a contender that could not be measured, and why."""


class WrongValues(AssertionError):
    """A contender computes something else."""


@dataclass(frozen=True)
class Entrant:
    """A contender. scope: entered around what calls. may_fail: then it is absent with its error."""

    name: str
    bind: Binder
    scope: Callable[[], AbstractContextManager] = nullcontext
    may_fail: bool = False


@dataclass(frozen=True)
class Bound:
    """A contender's call on every buffer, its error, and the operators that a call dispatches."""

    entrant: Entrant
    calls: list[Call]
    error: float
    operators: int | None


def absence(case: str, provider: str | None, reason: object) -> Row:
    """What a report says of what was not measured. provider None: the whole case."""
    return {"case": case, "provider": provider, "reason": first_line(reason)}


def first_line(reason: object) -> str:
    """Why something does not run here, in one line; of an error that is not ours, with its type."""
    lines = str(reason).strip().splitlines() or ["no message"]
    named = isinstance(reason, Exception) and not isinstance(reason, NotMeasured)
    return f"{type(reason).__name__}: {lines[0]}" if named else lines[0]


def sequences_of(case: AnyCase) -> Sequences:
    """How a case is computed."""
    kinds = {Case: FormSequences, ChoiceCase: ChoiceSequences, OperatorCase: OperatorSequences}
    return kinds[type(case)](case)


class Prepared:
    """The buffers of a case. Raises NotMeasured if they do not fit, or if it would take too long."""

    def __init__(
        self, case: AnyCase, device: torch.device, max_copies: int = MAX_COPIES, free: int | None = None
    ) -> None:
        self.case, self.sequences = case, sequences_of(case)
        if device.type == "cpu" and case.flops > MOST_FLOPS:
            reason = f"its MLP takes more than {MOST_FLOPS / 1e9:.0f} GFLOP a call; see the stream alone"
            raise NotMeasured(reason)
        needed = max(1, -(-COLD * last_level_cache_bytes(device) // max(1, case.operand_bytes)))
        copies = min(needed, max_copies)
        free = free_bytes(device) if free is None else free
        need = copies * case.operand_bytes + case.working_bytes
        if free is not None and need > free:
            raise NotMeasured(f"needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        self.cache = "cold" if copies == needed else "warm"
        self.buffers = [self.sequences.make(device, seed) for seed in range(copies)]
        self._written = [tensor.clone() for tensor in self.sequences.written(self.buffers[0])]
        self._exact = self.sequences.exact(self.buffers[0])
        self._restore()

    def _restore(self) -> None:
        for tensor, kept in zip(self.sequences.written(self.buffers[0]), self._written, strict=True):
            tensor.copy_(kept)

    def bound(self, entrant: Entrant) -> Bound:
        """Raises WrongValues, or NotMeasured if the contender may fail and does."""
        with entrant.scope():
            try:
                calls = [entrant.bind(operands) for operands in self.buffers]
                if entrant.may_fail:
                    calls[0]()
            except Exception as failure:
                if not entrant.may_fail:
                    raise
                raise NotMeasured(first_line(failure)) from failure
            if entrant.name == MLP_ALONE:
                return Bound(entrant, calls, 0.0, None)
            self._restore()
            with nullcontext() if entrant.may_fail else OperatorCount() as counter:
                result = calls[0]()
            error = self._error(entrant.name, result)
        return Bound(entrant, calls, error, counter.count if counter else None)

    def _error(self, name: str, result: object) -> float:
        sequences = self.sequences
        seen = zip(sequences.seen(self.buffers[0], result), self._exact, strict=True)
        error = max(sequences.off(found, exact) for found, exact in seen)
        if not error <= sequences.allowed:
            found = f"{self.case.name}: {name} is off by {error:.2e} (against the definition)"
            raise WrongValues(f"{found}, allowed {sequences.allowed:.2e}")
        return error

    def row(self, bound: Bound, timings: dict[str, Timing]) -> Row:
        """What a report shows of a contender."""
        case, name = self.case, bound.entrant.name
        row = {"case": case.name, "form": case.label, "size": case.size.name, "contender": name}
        row |= {"dtype": DTYPE_NAMES[case.dtype], "threads": torch.get_num_threads(), "rows": case.rows}
        row |= {"bytes": case.min_bytes, "flops": case.flops, "cache": self.cache}
        row |= {"buffers": len(self.buffers), "operators": bound.operators, "error": bound.error}
        own, alone, naive = timings[name], timings.get(MLP_ALONE), timings.get(NAIVE)
        row |= {"timing": asdict(own), "gbps": 1e-3 * case.min_bytes / own.median_us}
        row |= {"gflops": 1e-3 * case.flops / own.median_us} if case.flops else {}
        if name == MLP_ALONE:
            return row
        ratio = lambda other: timings[other].median_us / own.median_us
        row |= {key: ratio(other) for key, other in COMPARED.items() if other in timings}
        row |= {"beside_us": own.median_us - alone.median_us} if alone else {}
        return row | ({"cpu_vs_naive": naive.cpu_us / own.cpu_us} if naive and own.cpu_us else {})


def entrants(sequences: Sequences, inductor: str | None = "inductor") -> list[Entrant]:
    """Everybody on a CPU; inductor: the backend of torch.compile, None to leave it out."""
    found = [Entrant(name, bind) for name, bind in sequences.contenders.items()]
    if inductor:
        found.insert(2, Entrant(COMPILED, sequences.compiled(inductor), may_fail=True))
    return found


def measure_case(
    case: AnyCase,
    device: torch.device,
    effort: Effort,
    inductor: str | None = "inductor",
    max_copies: int = MAX_COPIES,
) -> tuple[list[Row], list[Row]]:
    """(rows, absences): check and time every contender of a case, on the same buffers, in turns."""
    try:
        prepared = Prepared(case, device, max_copies)
    except NotMeasured as reason:
        return [], [absence(case.name, None, reason)]
    bound, absent = {}, []
    for entrant in entrants(prepared.sequences, inductor):
        try:
            bound[entrant.name] = prepared.bound(entrant)
        except NotMeasured as reason:
            absent.append(absence(case.name, entrant.name, reason))
    timings = measure({name: one.calls for name, one in bound.items()}, effort, device)
    return [prepared.row(one, timings) for one in bound.values()], absent


def outcome(rows: Sequence[Row], absent: Sequence[Row]) -> str:
    """One line about a case."""
    times = ", ".join(f"{row['contender']} {row['timing']['median_us']:.1f} us" for row in rows)
    return times or absent[0]["reason"]
