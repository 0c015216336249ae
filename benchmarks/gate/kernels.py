"""Stage `kernels`: every case at the sizes of real models, by graph replay on rotating buffers, beside a copy
of the same run. Cases come in order of what they decide; what the budget does not reach is listed with the
reason.

`blocks` has partial blocks and choices of tokens, `cases` the forms.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode

import fastcache
from benchmarks.cases import (
    PARTIAL_BLOCKS,
    RMS,
    SIZES,
    TINY,
    TINY_TOKENS,
    TOKEN_SIZES,
    Case,
    ChoiceCase,
    Form,
    Size,
)
from benchmarks.contest import (
    Absence,
    AnyCase,
    Entrant,
    NotMeasured,
    Prepared,
    Row,
    WrongValues,
    first_line,
    outcome,
)
from benchmarks.gate.peers import PEERS
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.machine import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.operands import make_operands
from benchmarks.sequences import COMPILED, MLP_ALONE, OURS, OURS_EAGER, Sequences, ours
from benchmarks.timing import Effort, Replay, captured, extra_bytes, host_us, launches, measure_replays
from fastcache.ops import SlotMap

# by part of the device's name, the longest first
DATASHEET_GBPS = {"A100-SXM4-80GB": 2039.0, "H200": 4800.0, "H100": 3350.0, "B200": 8000.0, "A100": 1555.0}
EFFORT, ONCE = Effort(0.35, 15, 60), Effort(0.0, 1, 1)
DECISIVE = (Form.TRUNK, Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)
GATE_SIZES = (SIZES[0], Size("DiT-256 B8", 8, 256), *SIZES[2:])
BLOCK_SIZES = (TOKEN_SIZES[0], Size("N256 B64", 64, 256), *TOKEN_SIZES[1:])
BLOCK_SHARES = (0.07, 0.25, 0.01, 0.6)  # in order of what they decide
SMALLEST_GPU = 80e9  # bytes that every case must fit in, checked in a dry run
AUTOTUNE_SECONDS, AUTOTUNED_SIZES = (
    350.0,
    ("DiT-256 B2", "FLUX B1"),
)  # autotuning everywhere takes such a budget
CASE_SECONDS, BLOCK_SECONDS = 12.0, 6.0  # that must be left to begin a case
BLOCKS_SHARE = 0.25  # of the stage's budget, for partial blocks and choices of tokens
AUTOTUNED = "torch.compile autotuned"
OUR_BACKENDS = {"fastcache cuda": "cuda", "fastcache triton": "triton"}
STAND_INS = {"cuda": "cpp", "triton": "eager"}  # in a dry run on a CPU; eager where cpp was not built


@dataclass(frozen=True)
class GateRow(Row):
    """One contender of one case, all columns of the protocol.

    share_of_datasheet: gbps over the vendor's figure. host_us: of one call; launches: kernels and memory
    operations of one call; extra_bytes: most memory beyond the operands.
    """

    share_of_datasheet: float | None = None
    vs_autotuned: float | None = None
    host_us: float = 0.0
    launches: int | None = None
    extra_bytes: int | None = None


def form_cases(dry_run: bool) -> list[Case]:
    """bf16: the decisive forms at every size, then the others, then RMSNorm; fp32 at the smallest size
    last."""
    sizes = (TINY,) if dry_run else GATE_SIZES
    others = tuple(form for form in Form if form not in DECISIVE and form not in PARTIAL_BLOCKS)
    wanted = [(form, size) for part in (DECISIVE, others) for size in sizes for form in part]
    fits = [(form, size) for form, size in wanted if form in size.forms or (form in RMS and size.batch == 1)]
    found = [Case(form, size, torch.bfloat16) for form, size in (wanted if dry_run else fits)]
    return found + [Case(form, sizes[0], torch.float32) for form in DECISIVE]


def block_cases(dry_run: bool) -> list[AnyCase]:
    """Choices of tokens; then bf16 blocks, the stream alone first, common shares of tokens before rare
    ones."""
    sizes = (TINY_TOKENS,) if dry_run else BLOCK_SIZES
    wanted = [(form, share, size) for form in PARTIAL_BLOCKS for share in BLOCK_SHARES for size in sizes]
    blocks = [Case(form, size, torch.bfloat16, share) for form, share, size in wanted]
    return [*map(ChoiceCase, sizes), *blocks]


def kernels(stage: Stage) -> None:
    """Measure until the budget is spent."""
    device, brief = (
        torch.device("cpu" if stage.dry_run else "cuda"),
        (ONCE, 1) if stage.dry_run else (BRIEF, 8),
    )
    autotunes = stage.dry_run or stage.seconds_left >= AUTOTUNE_SECONDS
    if stage.dry_run:
        check_real_sizes(stage)
    with torch.no_grad():
        bandwidth = measure_bandwidth(device, *brief)
        name = device.type if stage.dry_run else torch.cuda.get_device_name(device)
        datasheet = datasheet_gbps(name)
        stage.put(device=name, cases=[], absent=[], blocks=[], blocks_absent=[], clocks=[])
        if not stage.dry_run:
            stage.put(bandwidth=asdict(bandwidth), datasheet_gbps=datasheet)
        measured = partial(measure_gate_case, device=device, bandwidth=bandwidth, datasheet=datasheet)
        deadline = time.monotonic() + BLOCKS_SHARE * stage.seconds_left
        left = lambda: float("inf") if stage.dry_run else deadline - time.monotonic()
        until(stage, "blocks", block_cases(stage.dry_run), left, BLOCK_SECONDS, measured)

        def chosen(case: AnyCase) -> tuple:
            return measured(case, autotune=autotunes or case.size.name in AUTOTUNED_SIZES)

        until(stage, "cases", form_cases(stage.dry_run), lambda: stage.seconds_left, CASE_SECONDS, chosen)
        if not stage.dry_run:
            stage.put(bandwidth_after=asdict(measure_bandwidth(device)))
    found = stage.found
    if not found["cases"]:
        raise Failed("no case was measured; `absent` says why")
    absent = (*found["absent"], *found["blocks_absent"])
    wrong = [f"{one['case']}: {one['provider']}" for one in absent if "WRONG" in one["reason"]]
    if wrong:
        raise Failed(f"wrong values, so not timed: {', '.join(wrong)}")


def until(
    stage: Stage,
    part: str,
    cases: Sequence[AnyCase],
    seconds_left: Callable[[], float],
    least: float,
    measured: Callable[[AnyCase], tuple[list[GateRow], list[Absence]]],
) -> None:
    """Cases of a part until fewer than `least` seconds are left; what is not reached is among its
    absences."""
    missing = "absent" if part == "cases" else f"{part}_absent"
    for number, case in enumerate(cases):
        if seconds_left() < least:
            reason = f"the budget of the {'stage' if part == 'cases' else part} was used up"
            stage.add(missing, *(asdict(Absence(late.name, None, reason)) for late in cases[number:]))
            return
        rows, absent = measured(case)
        stage.add(missing, *map(asdict, absent))
        if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
            stage.add(part, {"case": case.name, "ran": {row.contender: row.error for row in rows}})
            continue
        work = {} if part == "cases" else {"work": case.label}
        stage.add(part, *(asdict(row) | work for row in rows))
        stage.add("clocks", {"after": case.name, "seen": clocks()})
        stage.say(f"{number + 1}/{len(cases)} {case.name}: {outcome(rows, absent)}")
        gc.collect()  # memory of the last case, graphs included, so that the next one sees what is free
        torch.cuda.empty_cache()


def datasheet_gbps(device: str) -> float | None:
    """The vendor's memory bandwidth, None for a device that is not in the table."""
    return next((value for part, value in DATASHEET_GBPS.items() if part in device), None)


def measure_gate_case(
    case: AnyCase,
    device: torch.device,
    bandwidth: Bandwidth,
    datasheet: float | None = None,
    effort: Effort | None = None,
    *,
    autotune: bool = True,
) -> tuple[list[GateRow], list[Absence]]:
    """Check and time every contender of a case on the same buffers, in turns."""
    effort, copies = effort or (EFFORT if device.type == "cuda" else ONCE), {}
    if device.type == "cpu":
        copies = {"max_copies": 2}
    try:
        prepared = Prepared(case, device, **copies)
    except (NotMeasured, torch.cuda.OutOfMemoryError) as reason:
        return [], [Absence(case.name, None, str(reason).splitlines()[0])]
    taking_part, reasons = contenders(prepared.sequences, device, autotune=autotune)
    absent = [Absence(case.name, name, reason) for name, reason in reasons.items()]
    bound, replays = {}, {}
    ideal_us = 1e-3 * case.min_bytes / bandwidth.copy_gbps
    for entrant in taking_part:
        try:
            found = prepared.bound(entrant)
            with entrant.scope():
                replays[entrant.name] = scoped(captured(found.calls, device, ideal_us), entrant, device)
            bound[entrant.name] = found
        except NotMeasured as reason:
            absent.append(Absence(case.name, entrant.name, str(reason)))
        except WrongValues as reason:
            absent.append(Absence(case.name, entrant.name, f"WRONG VALUES: {reason}"))
        except RuntimeError as reason:  # out of memory too
            absent.append(Absence(case.name, entrant.name, first_line(reason)))
    timings = measure_replays(replays, effort, device) if replays else {}
    rows = []
    for name, one in bound.items():
        row = asdict(prepared.row(one, timings).against(bandwidth.copy_gbps)) | {"timing": timings[name]}
        with one.entrant.scope():
            cost = (
                host_us(one.calls, device),
                *(count(one.calls[0], device) for count in (launches, extra_bytes)),
            )
        shares = row["gbps"] / datasheet if datasheet else None
        tuned = timings[AUTOTUNED].median_us / timings[name].median_us if AUTOTUNED in timings else None
        rows.append(GateRow(**row, **dict(zip(EXTRA, (shares, tuned, *cost), strict=True))))
    return rows, absent


EXTRA = ("share_of_datasheet", "vs_autotuned", "host_us", "launches", "extra_bytes")


def contenders(
    sequences: Sequences, device: torch.device, *, autotune: bool
) -> tuple[list[Entrant], dict[str, str]]:
    """(who takes part, who does not and why): the host, torch.compile once or twice, ours twice, and peers.

    In a dry run what torch.compile gets is traced, and no code is made. A choice of tokens is ours as chosen.
    """
    case, status, absent = sequences.case, fastcache.backends_status(), {}
    found = [
        Entrant(name, bind) for name, bind in sequences.contenders.items() if name not in (OURS, OURS_EAGER)
    ]
    compiler, forms = "inductor" if device.type == "cuda" else "eager", not isinstance(case, ChoiceCase)
    found.append(Entrant(COMPILED, sequences.compiled(compiler), may_fail=True))
    if not forms:
        return [*found, Entrant(OURS, sequences.contenders[OURS])], absent
    if case.form not in PARTIAL_BLOCKS:
        if autotune:
            tuned = sequences.compiled(compiler, "max-autotune-no-cudagraphs")
            found.append(Entrant(AUTOTUNED, tuned, may_fail=True))
        else:
            absent[AUTOTUNED] = (
                "left out at this size to save time; `--seconds kernels=450` has it everywhere"
            )
    for name, backend in OUR_BACKENDS.items():
        if device.type != "cuda":
            backend = STAND_INS[backend] if status[STAND_INS[backend]].available else "eager"
        if status[backend].available:
            found.append(Entrant(name, sequences.contenders[OURS], partial(fastcache.use_backend, backend)))
        else:
            absent[name] = status[backend].reason
    found.sort(key=lambda entrant: entrant.name == MLP_ALONE)
    for peer in () if case.form in PARTIAL_BLOCKS else PEERS:
        reason = peer.absence(case)
        if reason:
            absent[peer.name] = reason
        else:
            found.append(Entrant(peer.name, partial(peer.bind, peer.module()), may_fail=True))
    return found, absent


def scoped(replay: Replay, entrant: Entrant, device: torch.device) -> Replay:
    """A graph needs no scope; in a rehearsal on a CPU each call runs in that of its backend."""

    def call() -> object:
        with entrant.scope():
            return replay.run()

    return replay if device.type == "cuda" else Replay(call, replay.calls, replay.results)


def check_real_sizes(stage: Stage) -> None:
    """Every real case, with tensors that have shapes and no memory: it must be accepted, and fit into a
    GPU."""
    forms, blocks = form_cases(False), block_cases(False)
    checked = [case for case in (*forms, *blocks) if isinstance(case, Case)]
    for case in checked:
        with FakeTensorMode(), torch.no_grad(), patch("benchmarks.operands.slot_map", unread_map):
            body = torch.nn.Identity() if case.form in PARTIAL_BLOCKS else None
            ours(case.form, make_operands(case, torch.device("cpu"), body=body))()
        need = case.operand_bytes + case.working_bytes
        if need > SMALLEST_GPU:
            raise Failed(f"{case.name}: needs {need / 1e9:.0f} GB, a GPU has {SMALLEST_GPU / 1e9:.0f}")
    largest = max(forms, key=lambda case: case.operand_bytes)
    described = f"{largest.name}, {math.ceil(largest.operand_bytes / 1e9)} GB"
    stage.put(real_blocks=len(blocks), real_cases=len(forms), largest=described)
    stage.say(f"{len(checked)} real cases are accepted; the largest is {largest.name}")


def unread_map(index: torch.Tensor, tokens: int) -> SlotMap:
    """`slot_map` without a look at the indices, which are not there."""
    return SlotMap(index.new_empty((index.shape[0], tokens), dtype=torch.int32), index.shape[1])


if __name__ == "__main__":
    run("kernels", kernels)
