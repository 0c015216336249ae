"""Measure everything and write bench.json, bench.md and roofline.png.

python -m benchmarks.run --out out/bench [--quick] [--only PART], of PARTS below
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases import FLAGSHIP, SIZES, TINY, TINY_TOKENS, TOKEN_SIZES, Case, Size, cases, token_cases
from benchmarks.contest import MAX_COPIES, AnyCase, Row, absence, measure_case, outcome
from benchmarks.generations import CPU, FORA_3, METHODS, MODEL_SIZES, TINY_MODEL, measure_generations
from benchmarks.machine import BRIEF, CACHES, kept_heap, machine, measure_bandwidth, threads
from benchmarks.report import write_report
from benchmarks.timing import Effort
from benchmarks.tokens import OperatorCase, dispatch_case, operator_cases

EFFORTS = {
    "flagship": Effort(12.0, 21, 300),
    "dispatch": Effort(2.0, 9, 100),
    "session": Effort(12.0, 3, 60),
    "operators": Effort(0.5, 5, 60),
    "forms": Effort(1.0, 5, 100),
    "tokens": Effort(0.5, 5, 60),
    "methods": Effort(25.0, 3, 30),
}
PARTS = tuple(EFFORTS)
SESSION_STEPS = 9
ONCE = Effort(0.0, 2, 2)
say = partial(print, flush=True)


@dataclass(frozen=True)
class Programme:
    """What a run measures, and how long. seconds: wall time after which no further form is begun."""

    quick: bool = False
    sizes: tuple[Size, ...] = SIZES
    token_sizes: tuple[Size, ...] = TOKEN_SIZES
    flagship: Case = FLAGSHIP
    operators: tuple[OperatorCase, ...] = tuple(operator_cases())
    model_sizes: tuple = MODEL_SIZES
    inductor: str | None = "inductor"
    seconds: float = 540.0

    def cases(self, part: str) -> Sequence[AnyCase]:
        """Of a part that is no generation."""
        if part == "forms":
            return cases(self.sizes)
        if part == "tokens":
            return token_cases(self.token_sizes)
        return {"flagship": [self.flagship], "dispatch": [dispatch_case()]}.get(part, self.operators)


FULL = Programme()
QUICK = Programme(
    quick=True,
    sizes=(TINY,),
    token_sizes=(TINY_TOKENS,),
    flagship=replace(FLAGSHIP, size=TINY),
    operators=tuple(operator_cases((24,), 64, 4, 2)),
    model_sizes=(TINY_MODEL,),
    inductor=None,
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
    write_report(run(QUICK if options.quick else FULL, options.only or PARTS), options.out)
    say(f"wrote bench.json, bench.md and roofline.png to {options.out}")


@torch.no_grad()
def run(programme: Programme, parts: Sequence[str] = PARTS) -> dict:
    """All of bench.json. The copy bandwidth is measured before and after the forms."""
    begun, found = time.perf_counter(), {"machine": machine(CPU), "quick": programme.quick}
    rows, methods, absent = [], [], []
    with kept_heap() as found["heap_kept"]:
        bandwidth = partial(measure_bandwidth, CPU, *((ONCE, 1) if programme.quick else (BRIEF, CACHES)))
        bursts = [bandwidth()]
        for part in (part for part in PARTS if part in parts):
            say(part)
            effort = ONCE if programme.quick else EFFORTS[part]
            if part in ("session", "methods"):
                short = [replace(size, steps=SESSION_STEPS) for size in programme.model_sizes]
                what = (short, (FORA_3,)) if part == "session" else (programme.model_sizes, METHODS)
                made = measure_generations(effort, *what, say)
                methods += [row | {"part": part} for row in made]
                continue
            with threads(1 if part in ("flagship", "dispatch") else torch.get_num_threads()):
                own = bandwidth() if part == "flagship" else None
                made, missing = measured(programme, part, effort, begun)
                bursts += [own or bandwidth()] if part in ("flagship", "forms") else []
            for row in made:
                own_share = {"share_of_copy": row["gbps"] / own.copy_gbps} if own else {}
                rows.append(row | {"part": part} | own_share)
            absent += missing
    best = {key: max(getattr(one, key) for one in bursts) for key in ("copy_gbps", "read_gbps")}
    rows = [{"share_of_copy": row["gbps"] / best["copy_gbps"]} | row for row in rows]
    found |= {"seconds": time.perf_counter() - begun, "load_after": os.getloadavg()[0], **best}
    return found | {"bandwidths": [*map(asdict, bursts)], "rows": rows, "methods": methods, "absent": absent}


def measured(programme: Programme, part: str, effort: Effort, begun: float) -> tuple[list[Row], list[Row]]:
    """(rows, absences) of a part, with a line about each case. begun: a reading of time.perf_counter."""
    rows, absent, cases_ = [], [], programme.cases(part)
    copies = 2 if programme.quick else MAX_COPIES
    for number, case in enumerate(cases_, start=1):
        if part == "forms" and time.perf_counter() - begun > programme.seconds:
            reason = f"the wall-time budget of the run, {programme.seconds:.0f} s, was used up"
            absent.append(absence(case.name, None, reason))
            continue
        found, missing = measure_case(case, CPU, effort, programme.inductor, copies)
        rows, absent = rows + found, absent + missing
        say(f"{number}/{len(cases_)} {case.name}: {outcome(found, missing)}")
    return rows, absent


if __name__ == "__main__":
    main()
