"""Measure everything and write bench.json, bench.md and roofline.png.

python -m benchmarks.run --out out/bench [--only forms|flagship|dispatch|session|operators|tokens|methods] [--quick]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bandwidth import BRIEF, CACHES, ceiling, measure_bandwidth
from benchmarks.cases import FLAGSHIP, SIZES, TINY, Case, Form, Size, cases
from benchmarks.dispatch import CALLS, measure_dispatch
from benchmarks.flagship import measure_flagship
from benchmarks.forms import MAX_COPIES, Absence, Row, measure_case
from benchmarks.machine import kept_heap, load, machine, threads
from benchmarks.methods import MODEL_SIZES, TINY_MODEL, ModelSize, measure_methods, with_floors
from benchmarks.providers import Provider
from benchmarks.report import Report, write_report
from benchmarks.roofline import draw_roofline
from benchmarks.session import SESSION_SIZES, TINY_SESSION, SessionSize, measure_session
from benchmarks.timing import Effort
from benchmarks.token_cases import SIZES as TOKEN_SIZES
from benchmarks.token_cases import TINY as TINY_TOKENS
from benchmarks.token_cases import TokenSize, block_cases, choice_cases
from benchmarks.token_operators import OperatorCase, measure_operators, operator_cases
from benchmarks.tokens import measure_tokens

PARTS = ("flagship", "dispatch", "session", "operators", "forms", "tokens", "methods")


@dataclass(frozen=True)
class Programme:
    """What a run measures, and how long. seconds: wall time of the run after which no further case is begun."""

    sizes: tuple[Size, ...] = SIZES
    flagship: Case = FLAGSHIP
    session_sizes: tuple[SessionSize, ...] = SESSION_SIZES
    providers: tuple[Provider, ...] = tuple(Provider)
    forms: Effort = Effort(1.0, 5, 100)
    flagship_effort: Effort = Effort(12.0, 21, 300)
    dispatch: Effort = Effort(2.0, 9, 100)
    session: Effort = Effort(12.0, 3, 60)
    bandwidth: Effort = BRIEF
    seconds: float = 540.0
    caches: int = CACHES
    max_copies: int = MAX_COPIES
    dispatch_calls: int = CALLS
    token_sizes: tuple[TokenSize, ...] = TOKEN_SIZES
    tokens: Effort = Effort(0.5, 5, 60)
    operator_cases: tuple[OperatorCase, ...] = tuple(operator_cases())
    operators: Effort = Effort(0.5, 5, 60)
    model_sizes: tuple[ModelSize, ...] = MODEL_SIZES
    methods: Effort = Effort(25.0, 3, 30)


FULL = Programme()
_ONCE = Effort(0.0, 3, 3)
QUICK = Programme(
    (TINY,),
    Case(Form.TRUNK, TINY, torch.bfloat16),
    (TINY_SESSION,),
    tuple(p for p in Provider if p is not Provider.COMPILED),
    *[_ONCE] * 5,
    seconds=60.0,
    caches=1,
    max_copies=2,
    dispatch_calls=20,
    token_sizes=(TINY_TOKENS,),
    tokens=_ONCE,
    operator_cases=tuple(operator_cases((24,), (24,), 64, 4, 2)),
    operators=_ONCE,
    model_sizes=(TINY_MODEL,),
    methods=Effort(0.0, 2, 2),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure FastCache against eager PyTorch and torch.compile.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), help="folder for bench.json, bench.md and roofline.png"
    )
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="measure this part only (may be given again)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, without torch.compile: shows that everything runs, and measures nothing",
    )
    options = parser.parse_args(arguments)
    report = run(QUICK if options.quick else FULL, tuple(options.only or PARTS), quick=options.quick)
    write_report(report, options.out)
    copies = [burst for burst in report.bandwidths if burst.copy_gbps == report.copy_gbps]
    where = report.machine.environment
    subtitle = f"{where.processor}, {where.threads} threads, torch {where.torch}, FastCache {where.fastcache} ({where.backend}), {report.machine.date[:10]}"
    draw_roofline(report.forms, report.copy_gbps, copies[0].read_gbps, subtitle, options.out / "roofline.png")
    say(f"wrote bench.json, bench.md and roofline.png to {options.out}")


@torch.no_grad()
def run(
    programme: Programme,
    parts: Sequence[str] = PARTS,
    *,
    quick: bool = False,
    device: torch.device = torch.device("cpu"),
) -> Report:
    """Measure the parts; the copy bandwidth before and after the forms."""
    begun, at_start = time.perf_counter(), machine(device)
    flagship, dispatch, session, rows, absent, blocks, choices, methods, operators = (
        None,
        (),
        (),
        (),
        (),
        (),
        (),
        (),
        (),
    )
    with kept_heap() as heap_kept:
        say("copy bandwidth")
        bursts = [measure_bandwidth(device, programme.bandwidth, programme.caches)]
        if "flagship" in parts:
            say("flagship: 56 terms, one thread")
            with threads(1):
                bandwidth = measure_bandwidth(device, programme.bandwidth, programme.caches)
                flagship = measure_flagship(
                    programme.flagship, device, programme.flagship_effort, programme.providers, bandwidth
                )
        if "dispatch" in parts:
            say("dispatch")
            dispatch = measure_dispatch(device, programme.dispatch, programme.dispatch_calls)
        if "session" in parts:
            session = measure_session(
                programme.session, programme.session_sizes, lambda name: say(f"session: {name}")
            )
        if "operators" in parts:
            operators, missing = measure_operators(
                programme.operator_cases, device, programme.operators, programme.providers, say
            )
            absent = (*absent, *missing)
        if "forms" in parts:
            rows, missing = measure_forms(programme, device, begun + programme.seconds)
            absent = (*absent, *missing)
            bursts.append(measure_bandwidth(device, programme.bandwidth, programme.caches))
        if "tokens" in parts:
            blocks, choices, missing = measure_tokens(
                block_cases(programme.token_sizes),
                choice_cases(programme.token_sizes),
                device,
                programme.tokens,
                programme.providers,
                programme.max_copies,
                say,
            )
            absent = (*absent, *missing)
        if "methods" in parts:
            methods = measure_methods(programme.methods, programme.model_sizes, say=say)
    copy_gbps = ceiling(bursts, torch.get_num_threads())
    rows, blocks, choices = (
        tuple(row.against(copy_gbps) for row in found) for found in (rows, blocks, choices)
    )
    methods = with_floors(methods, copy_gbps, max(burst.read_gbps for burst in bursts), programme.model_sizes)
    return Report(
        at_start,
        quick,
        heap_kept,
        time.perf_counter() - begun,
        load(),
        tuple(bursts),
        flagship,
        rows,
        absent,
        dispatch,
        session,
        blocks,
        choices,
        methods,
        operators,
    )


def measure_forms(
    programme: Programme, device: torch.device, deadline: float
) -> tuple[tuple[Row, ...], tuple[Absence, ...]]:
    """Every case that begins before `deadline`, a reading of time.perf_counter."""
    rows, absent = [], []
    found = cases(programme.sizes)
    for number, case in enumerate(found, start=1):
        if time.perf_counter() > deadline:
            absent.append(
                Absence(
                    case.name,
                    None,
                    f"the wall-time budget of the run, {programme.seconds:.0f} s, was used up",
                )
            )
            continue
        measured = measure_case(case, device, programme.forms, programme.providers, programme.max_copies)
        rows += measured.rows
        absent += measured.absent
        say(f"{number}/{len(found)} {case.name}: {outcome(measured.rows)}")
    return tuple(rows), tuple(absent)


def outcome(rows: Sequence[Row]) -> str:
    """One line about a case."""
    ours = next((row for row in rows if row.provider == Provider.OURS.value), None)
    if ours is None:
        return "not measured"
    compiled = "" if ours.vs_compile is None else f", {ours.vs_compile:.2f}x compile"
    return f"{ours.timing.median_us:.0f} us, {ours.gbps:.1f} GB/s, {ours.vs_naive:.2f}x naive{compiled}"


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
