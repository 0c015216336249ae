"""Stage `kernels`: every form at the sizes of real models, by graph replay on rotating buffers, beside a copy of the same run.

Cases come in order of what they decide; what the budget does not reach is listed with the reason.
"""

import gc
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode

from benchmarks.bandwidth import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.cases import SIZES, TINY, Case, Form, Size
from benchmarks.correctness import WrongValues
from benchmarks.forms import Absence, NotMeasured, Prepared, gbps, input_bytes
from benchmarks.gate.blocks import check_real_blocks, measure_blocks
from benchmarks.gate.contenders import AUTOTUNED, BEST, COMPILED, NAIVE, Contender, contenders
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.graphed import captured, extra_bytes, host_us, launches, measure_replays
from benchmarks.inputs import make_inputs
from benchmarks.providers import OURS
from benchmarks.timing import Effort, Timing
from fastcache.ops import SlotMap

DATASHEET_GBPS = {
    "H200": 4800.0,
    "H100": 3350.0,
    "B200": 8000.0,
    "A100-SXM4-80GB": 2039.0,
    "A100": 1555.0,
}  # by part of the device's name, the longest first
EFFORT, ONCE = Effort(0.35, 15, 60), Effort(0.0, 1, 1)
DECISIVE = (Form.TRUNK, Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)
SMALLEST_GPU = 80e9  # bytes that every case must fit in, checked in a dry run
AUTOTUNE_SECONDS, AUTOTUNED_SIZES = (
    350.0,
    ("DiT-256 B2", "FLUX B1"),
)  # autotuning everywhere takes such a budget
CASE_SECONDS = 12.0  # that must be left to begin a case
BLOCKS_SHARE = 0.25  # of the stage's budget, for partial blocks and choices of tokens
NEW_SIZES = (Size("DiT-256 B8", 8, 256, 1152, 56),)


@dataclass(frozen=True)
class GateRow:
    """One contender of one case, all columns of the protocol.

    bytes: the least that the form moves; gbps: these over the median; share_of_copy, share_of_datasheet:
    of the copy of this run, and of the vendor's figure. host_us: of one call; launches: kernels and memory
    operations of one call; extra_bytes: most memory beyond the operands. vs_*: times faster than that
    contender. cache: cold if the rotating buffers exceed twice the last-level cache.
    """

    case: str
    form: str
    size: str
    dtype: str
    contender: str
    bytes: int
    cache: str
    buffers: int
    timing: Timing
    gbps: float
    share_of_copy: float | None
    share_of_datasheet: float | None
    host_us: float
    launches: int | None
    extra_bytes: int | None
    error: float
    vs_naive: float | None
    vs_best_eager: float | None
    vs_compile: float | None
    vs_autotuned: float | None


def gate_cases(dry_run: bool) -> list[Case]:
    """bf16: the decisive forms at every size, then the others, then RMSNorm; fp32 at the smallest size last."""
    sizes = (TINY,) if dry_run else (*SIZES[:1], *NEW_SIZES, *SIZES[2:])
    forms = (*DECISIVE, *(form for form in Form if form not in DECISIVE))
    fits = lambda form, size: form in size.forms or (form.rms and size.batch == 1)  # noqa: E731
    ordered = [
        Case(form, size, torch.bfloat16)
        for part in (DECISIVE, tuple(form for form in forms if form not in DECISIVE))
        for size in sizes
        for form in part
        if dry_run or fits(form, size)
    ]
    return ordered + [Case(form, sizes[0], torch.float32) for form in DECISIVE]


def kernels(stage: Stage) -> None:
    """Measure until the budget is spent."""
    device, begun = torch.device("cpu" if stage.dry_run else "cuda"), time.monotonic()
    if stage.dry_run:
        check_real_sizes(stage)
    with torch.no_grad():
        bandwidth = measure_bandwidth(
            device, ONCE if stage.dry_run else BRIEF, caches=1 if stage.dry_run else 8
        )
        name = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
        stage.put(device=name, cases=[], absent=[], clocks=[])
        if not stage.dry_run:
            stage.put(bandwidth=asdict(bandwidth), datasheet_gbps=datasheet_gbps(name))
        cases = gate_cases(stage.dry_run)
        measure_blocks(
            stage,
            device,
            bandwidth,
            EFFORT if device.type == "cuda" else ONCE,
            0.0 if stage.dry_run else BLOCKS_SHARE * stage.seconds_left,
        )
        if not stage.dry_run:
            release()
        for number, case in enumerate(cases, start=1):
            if stage.seconds_left < CASE_SECONDS:
                stage.add(
                    "absent",
                    *(
                        asdict(Absence(late.name, None, "the budget of the stage was used up"))
                        for late in cases[number - 1 :]
                    ),
                )
                break
            rows, absent = measure_gate_case(
                case,
                device,
                bandwidth,
                datasheet_gbps(name),
                EFFORT if device.type == "cuda" else ONCE,
                autotune=stage.dry_run
                or stage.deadline - begun >= AUTOTUNE_SECONDS
                or case.size.name in AUTOTUNED_SIZES,
            )
            stage.add("absent", *map(asdict, absent))
            if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
                stage.add("cases", {"case": case.name, "ran": {row.contender: row.error for row in rows}})
                continue
            stage.add("cases", *map(asdict, rows))
            stage.add("clocks", {"after": case.name, "seen": clocks()})
            stage.say(
                f"{number}/{len(cases)} {case.name}: "
                + (
                    ", ".join(f"{row.contender} {row.timing.median_us:.1f} us" for row in rows)
                    or absent[0].reason
                )
            )
            release()
        if not stage.dry_run:
            stage.put(bandwidth_after=asdict(measure_bandwidth(device, BRIEF)))
    found = stage.results.stage("kernels")
    if not found["cases"]:
        raise Failed("no case was measured; `absent` says why")
    wrong = [
        one["case"] + ": " + one["provider"]
        for one in (*found["absent"], *found["blocks_absent"])
        if "WRONG" in one["reason"]
    ]
    if wrong:
        raise Failed(f"wrong values, so not timed: {', '.join(wrong)}")


def release() -> None:
    """Give memory of the last case back, graphs included, so that the next one sees what is free."""
    gc.collect()
    torch.cuda.empty_cache()


def datasheet_gbps(device: str) -> float | None:
    """The vendor's memory bandwidth, None for a device that is not in the table."""
    return next(
        (
            value
            for part, value in sorted(DATASHEET_GBPS.items(), key=lambda item: -len(item[0]))
            if part in device
        ),
        None,
    )


def measure_gate_case(
    case: Case,
    device: torch.device,
    bandwidth: Bandwidth,
    datasheet: float | None,
    effort: Effort,
    *,
    autotune: bool = True,
) -> tuple[list[GateRow], list[Absence]]:
    """Check and time every contender of a case on the same buffers, in turns."""
    try:
        prepared = Prepared(case, device, **({} if device.type == "cuda" else {"max_copies": 2}))
    except (NotMeasured, torch.cuda.OutOfMemoryError) as reason:
        return [], [Absence(case.name, None, str(reason).splitlines()[0])]
    taking_part, reasons = contenders(case, device, autotune=autotune)
    absent = [Absence(case.name, name, reason) for name, reason in reasons.items()]
    bound: dict[str, tuple[Contender, list, float]] = {}
    replays = {}
    ideal_us = 1e-3 * case.min_bytes / bandwidth.copy_gbps
    for contender in taking_part:
        try:
            with contender.scope():
                calls, error = prepared.bound_by(contender.name, contender.bind, may_fail=contender.may_fail)
                replays[contender.name] = captured(calls, device, ideal_us)
                bound[contender.name] = contender, calls, error
        except NotMeasured as reason:
            absent.append(Absence(case.name, contender.name, str(reason)))
        except WrongValues as reason:
            absent.append(Absence(case.name, contender.name, f"WRONG VALUES: {reason}"))
        except (RuntimeError, torch.cuda.OutOfMemoryError) as reason:
            absent.append(
                Absence(case.name, contender.name, f"{type(reason).__name__}: {str(reason).splitlines()[0]}")
            )
    if not replays:
        return [], absent
    with ExitStack() as stack:
        if device.type == "cpu":  # a graph needs no scope; a rehearsal runs each call in its own
            replays = {name: _within(stack, bound[name][0], replay) for name, replay in replays.items()}
        timings = measure_replays(replays, effort, device)
    ratio = lambda name, own: timings[name].median_us / own.median_us if name in timings else None  # noqa: E731
    rows = []
    for name, (contender, calls, error) in bound.items():
        own, rate = timings[name], gbps(case, timings[name])
        with contender.scope():
            cost = host_us(calls, device), launches(calls[0], device), extra_bytes(calls[0], device)
        rows.append(GateRow(
            case.name, case.form.value, case.size.name, case.dtype_name, name, case.min_bytes, prepared.cache, len(prepared.buffers), own, rate, rate / bandwidth.copy_gbps, None if datasheet is None else rate / datasheet,
            *cost, error, ratio(NAIVE, own), ratio(BEST, own), ratio(COMPILED, own), ratio(AUTOTUNED, own),
        ))  # fmt: skip
    return rows, absent


def _within(stack: ExitStack, contender: Contender, replay):
    """The replay, run inside the contender's scope."""

    def run_in_scope() -> None:
        with contender.scope():
            replay.run()

    return type(replay)(run_in_scope, replay.calls, replay.results)


def check_real_sizes(stage: Stage) -> None:
    """Every real case, with tensors that have shapes and no memory: it must be accepted, and fit into a GPU."""
    checked = gate_cases(dry_run=False)
    for case in checked:
        with FakeTensorMode(), torch.no_grad(), patch("benchmarks.inputs.slot_map", unread_map):
            inputs = make_inputs(case, torch.device("cpu"))
            OURS[case.form](inputs)()
        need = input_bytes(case) + 4 * 16 * case.size.elements
        if need > SMALLEST_GPU:
            raise Failed(f"{case.name}: needs {need / 1e9:.0f} GB, a GPU has {SMALLEST_GPU / 1e9:.0f}")
    largest = max(checked, key=input_bytes)
    stage.put(
        real_blocks=check_real_blocks(SMALLEST_GPU),
        real_cases=len(checked),
        largest=f"{largest.name}, {math.ceil(input_bytes(largest) / 1e9)} GB",
    )
    stage.say(f"{len(checked)} real cases are accepted; the largest is {largest.name}")


def unread_map(index: torch.Tensor, tokens: int) -> SlotMap:
    """`slot_map` without a look at the indices, which are not there."""
    return SlotMap(index.new_empty((index.shape[0], tokens), dtype=torch.int32), index.shape[1])


if __name__ == "__main__":
    run("kernels", kernels)
