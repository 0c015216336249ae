"""Measure everything and write bench.json, bench.md and roofline.png.

python -m benchmarks.run --out out/bench [--only forms|flagship|dispatch|session|operators|tokens|methods]
[--quick]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import (
    FLAGSHIP,
    SIZES,
    TINY,
    TINY_TOKENS,
    TOKEN_SIZES,
    Case,
    ChoiceCase,
    Form,
    Size,
    block_cases,
    cases,
)
from benchmarks.contest import MAX_COPIES, Absence, AnyCase, measure_case, measure_cases
from benchmarks.dispatch import CALLS, measure_dispatch
from benchmarks.generations import (
    CPU,
    FORA_3,
    METHODS,
    MODEL_SIZES,
    SESSION_SIZES,
    TINY_MODEL,
    ModelSize,
    measure_generations,
)
from benchmarks.machine import BRIEF, CACHES, kept_heap, load, machine, measure_bandwidth, threads
from benchmarks.report import Flagship, Report, write_report
from benchmarks.timing import Effort
from benchmarks.tokens import OperatorCase, operator_cases

PARTS = ("flagship", "dispatch", "session", "operators", "forms", "tokens", "methods")
say = partial(print, flush=True)


@dataclass(frozen=True)
class Programme:
    """What a run measures, and how long. seconds: wall time of the run after which no further form is
    begun."""

    sizes: tuple[Size, ...] = SIZES
    token_sizes: tuple[Size, ...] = TOKEN_SIZES
    flagship_case: Case = FLAGSHIP
    operator_cases: tuple[OperatorCase, ...] = tuple(operator_cases())
    session_sizes: tuple[ModelSize, ...] = SESSION_SIZES
    model_sizes: tuple[ModelSize, ...] = MODEL_SIZES
    inductor: str | None = "inductor"
    seconds: float = 540.0
    caches: int = CACHES
    max_copies: int = MAX_COPIES
    dispatch_calls: int = CALLS
    bandwidth: Effort = BRIEF
    flagship: Effort = Effort(12.0, 21, 300)
    dispatch: Effort = Effort(2.0, 9, 100)
    session: Effort = Effort(12.0, 3, 60)
    forms: Effort = Effort(1.0, 5, 100)
    tokens: Effort = Effort(0.5, 5, 60)
    methods: Effort = Effort(25.0, 3, 30)


FULL = Programme()
_ONCE = Effort(0.0, 2, 2)
QUICK = Programme(
    (TINY,),
    (TINY_TOKENS,),
    Case(Form.TRUNK, TINY, torch.bfloat16),
    tuple(operator_cases((24,), 64, 4, 2)),
    (TINY_MODEL,),
    (TINY_MODEL,),
    None,
    60.0,
    1,
    2,
    20,
    *[_ONCE] * 7,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    text = "Measure FastCache against eager PyTorch and torch.compile."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=text)
    written = "folder for bench.json, bench.md and roofline.png"
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help=written)
    only = "measure this part only (may be given again)"
    parser.add_argument("--only", choices=PARTS, action="append", help=only)
    quick = "tiny sizes, without torch.compile: shows that everything runs, and measures nothing"
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    programme = QUICK if options.quick else FULL
    write_report(run(programme, tuple(options.only or PARTS), quick=options.quick), options.out)
    say(f"wrote bench.json, bench.md and roofline.png to {options.out}")


@torch.no_grad()
def run(programme: Programme, parts: Sequence[str] = PARTS, *, quick: bool = False) -> Report:
    """Measure the parts; the copy bandwidth before and after the forms."""
    begun, at_start, found, absent = time.perf_counter(), machine(CPU), {}, []
    bandwidth = partial(measure_bandwidth, CPU, programme.bandwidth, programme.caches)

    def measured(cases: Sequence[AnyCase], effort: Effort, deadline: float = float("inf")) -> tuple:
        one = partial(_before, deadline, effort, programme)
        rows, missing = measure_cases(cases, one, say)
        absent.extend(missing)
        return rows

    with kept_heap() as heap_kept:
        say("copy bandwidth")
        bursts = [bandwidth()]
        if "flagship" in parts:
            say("flagship: 56 terms, one thread")
            with threads(1):
                single = bandwidth()
                rows = measured([programme.flagship_case], programme.flagship)
            found["flagship"] = Flagship(tuple(row.against(single.copy_gbps) for row in rows), single)
        if "dispatch" in parts:
            say("dispatch")
            found["dispatch"] = measure_dispatch(CPU, programme.dispatch, programme.dispatch_calls)
        if "session" in parts:
            models = programme.session, programme.session_sizes, (FORA_3,)
            found["session"] = measure_generations(*models, bursts[0], say)
        if "operators" in parts:
            found["operators"] = measured(programme.operator_cases, programme.tokens)
        if "forms" in parts:
            found["forms"] = measured(cases(programme.sizes), programme.forms, begun + programme.seconds)
            bursts.append(bandwidth())
        if "tokens" in parts:
            found["choices"] = measured(
                [ChoiceCase(size) for size in programme.token_sizes], programme.tokens
            )
            found["blocks"] = measured(block_cases(programme.token_sizes), programme.tokens)
        if "methods" in parts:
            found["methods"] = measure_generations(
                programme.methods, programme.model_sizes, METHODS, bursts[0], say
            )
    copy, read = max(burst.copy_gbps for burst in bursts), max(burst.read_gbps for burst in bursts)
    for part in ("operators", "forms", "choices", "blocks"):
        found[part] = tuple(row.against(copy) for row in found.get(part, ()))
    seconds = time.perf_counter() - begun
    return Report(
        at_start, quick, heap_kept, seconds, load(), tuple(bursts), copy, read, tuple(absent), **found
    )


def _before(deadline: float, effort: Effort, programme: Programme, case: AnyCase) -> tuple[list, list]:
    """A case, if it begins before the deadline, a reading of time.perf_counter."""
    if time.perf_counter() > deadline:
        reason = f"the wall-time budget of the run, {programme.seconds:.0f} s, was used up"
        return [], [Absence(case.name, None, reason)]
    return measure_case(case, CPU, effort, programme.inductor, programme.max_copies)


if __name__ == "__main__":
    main()
