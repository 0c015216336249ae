"""Stage `kernels`: every case at the sizes of real models, by graph replay, beside a copy of the same run.

Cases come in order of what they decide, partial blocks and choices of tokens first; what the budget does not
reach is listed with the reason.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

import fastcache
from benchmarks.cases import (
    FORMS,
    PARTIAL_BLOCKS,
    SIZES,
    TINY,
    TINY_TOKENS,
    TOKEN_SIZES,
    Case,
    ChoiceCase,
    Form,
    Size,
)
from benchmarks.contest import AnyCase, Entrant, NotMeasured, Prepared, Row, WrongValues, absence, outcome
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.machine import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.sequences import AUTOTUNED, COMPILED, MLP_ALONE, OURS, OURS_EAGER, Sequences
from benchmarks.timing import Effort, captured, host_us, launches, measure

# by part of the device's name, the longest first
DATASHEET_GBPS = {"A100-SXM4-80GB": 2039.0, "H200": 4800.0, "H100": 3350.0, "B200": 8000.0, "A100": 1555.0}
EFFORT, ONCE = Effort(0.35, 15, 60), Effort(0.0, 1, 1)
DECISIVE = (Form.TRUNK, Form.UPDATE, Form.UPDATE_MODULATE, Form.MODULATE)
GATE_SIZES = (SIZES[0], Size("DiT-256-B8", 8, 256), *SIZES[2:])
BLOCK_SIZES = (TOKEN_SIZES[0], Size("N256-B64", 64, 256), *TOKEN_SIZES[1:])
BLOCK_SHARES = (0.07, 0.25, 0.01, 0.6)  # in order of what they decide
AUTOTUNE_SECONDS = 350.0  # a budget that pays for autotuning at every size
AUTOTUNED_SIZES = ("DiT-256-B2", "FLUX-B1", "Tiny-B2")
CASE_SECONDS = {"tokens": 6.0, "forms": 12.0}  # that must be left to begin a case
TOKENS_SHARE = 0.25  # of the stage's budget, for the part `tokens`
OUR_BACKENDS = {"fastcache cuda": "cuda", "fastcache triton": "triton"}
STAND_INS = {"cuda": "cpp", "triton": "eager"}  # in a dry run on a CPU


@dataclass(frozen=True)
class Gpu:
    """What cases are measured on, and against: the copy of this run and the vendor's figure."""

    device: torch.device
    bandwidth: Bandwidth
    datasheet: float | None = None
    autotune_everywhere: bool = True
    effort: Effort = EFFORT


def form_cases(sizes: tuple[Size, ...] = GATE_SIZES) -> list[Case]:
    """bf16: the decisive forms at every size, then the others; fp32 at the smallest size last."""
    others = tuple(form for form in FORMS if form not in DECISIVE)
    wanted = [(form, size) for part in (DECISIVE, others) for size in sizes for form in part]
    found = [Case(form, size, torch.bfloat16) for form, size in wanted if form in size.forms]
    return found + [Case(form, sizes[0], torch.float32) for form in DECISIVE]


def token_cases(sizes: tuple[Size, ...] = BLOCK_SIZES) -> list[AnyCase]:
    """Choices of tokens; then bf16 blocks, the stream alone first, common shares before rare ones."""
    wanted = [(form, size, share) for form in PARTIAL_BLOCKS for share in BLOCK_SHARES for size in sizes]
    blocks = [Case(form, size, torch.bfloat16, share) for form, size, share in wanted]
    return [*map(ChoiceCase, sizes), *blocks]


def kernels(stage: Stage) -> None:
    """Measure until the budget is spent. Times of a rehearsal on a CPU mean nothing, and are not kept."""
    dry = stage.dry_run
    device = torch.device("cpu" if dry else "cuda")
    sizes = ((TINY_TOKENS,), (TINY,)) if dry else (BLOCK_SIZES, GATE_SIZES)
    parts = {"tokens": token_cases(sizes[0]), "forms": form_cases(sizes[1])}
    name = device.type if dry else torch.cuda.get_device_name(device)
    vendor = next((gbps for part, gbps in DATASHEET_GBPS.items() if part in name), None)
    with torch.no_grad():
        bandwidth = measure_bandwidth(device, *((ONCE, 1) if dry else (BRIEF, 8)))
        gpu = Gpu(device, bandwidth, vendor, stage.seconds_left >= AUTOTUNE_SECONDS, ONCE if dry else EFFORT)
        stage.put(device=name, rows=[], absent=[], clocks=[])
        if not dry:
            stage.put(bandwidth=asdict(bandwidth), datasheet_gbps=vendor)
        deadline = time.monotonic() + TOKENS_SHARE * stage.seconds_left
        for part, cases in parts.items():
            for number, case in enumerate(cases, start=1):
                left = deadline - time.monotonic() if part == "tokens" else stage.seconds_left
                if left < CASE_SECONDS[part]:
                    reason = f"the budget of the part {part} was used up"
                    stage.add("absent", *(absence(late.name, None, reason) for late in cases[number - 1 :]))
                    break
                rows, absent = measure_gate_case(case, gpu)
                kept = [{key: row[key] for key in ("case", "contender", "error")} for row in rows]
                stage.add("rows", *(row | {"part": part} for row in (kept if dry else rows)))
                stage.add("absent", *absent)
                if not dry:
                    stage.add("clocks", {"after": case.name, "seen": clocks()})
                    stage.say(f"{part} {number}/{len(cases)} {case.name}: {outcome(rows, absent)}")
                    gc.collect()  # memory of the case, graphs included, so that the next one sees it free
                    torch.cuda.empty_cache()
        if not dry:
            stage.put(bandwidth_after=asdict(measure_bandwidth(device)))
    if not stage.found["rows"]:
        raise Failed("no case was measured; `absent` says why")
    wrong = [one for one in stage.found["absent"] if one["reason"].startswith(WrongValues.__name__)]
    if wrong:
        names = ", ".join(f"{one['case']}: {one['provider']}" for one in wrong)
        raise Failed(f"wrong values, so not timed: {names}")


def measure_gate_case(case: AnyCase, gpu: Gpu) -> tuple[list[Row], list[Row]]:
    """(rows, absences): check and time every contender of a case on the same buffers, in turns.

    Rows have more than those of a CPU: share_of_datasheet; of one call host_us, and launches, its kernels and
    memory operations.
    """
    device, copy_gbps = gpu.device, gpu.bandwidth.copy_gbps
    copies = {"max_copies": 2} if device.type == "cpu" else {}
    try:
        prepared = Prepared(case, device, **copies)
    except (NotMeasured, torch.cuda.OutOfMemoryError) as reason:
        return [], [absence(case.name, None, reason)]
    absent, bound, replays, rows = [], {}, {}, []
    for entrant in contenders(prepared.sequences, gpu):
        try:
            found = prepared.bound(entrant)
            with entrant.scope():
                replays[entrant.name] = [captured(found.calls, device, 1e-3 * case.min_bytes / copy_gbps)]
            bound[entrant.name] = found
        except (NotMeasured, WrongValues, RuntimeError) as reason:  # a backend that is absent, memory too
            absent.append(absence(case.name, entrant.name, reason))
    timings = measure(replays, gpu.effort, device)
    for one in bound.values():
        row = prepared.row(one, timings)
        with one.entrant.scope():
            row |= {"host_us": host_us(one.calls, device), "launches": launches(one.calls[0], device)}
        datasheet = row["gbps"] / gpu.datasheet if gpu.datasheet else None
        rows.append(row | {"share_of_copy": row["gbps"] / copy_gbps, "share_of_datasheet": datasheet})
    return rows, absent


def contenders(sequences: Sequences, gpu: Gpu) -> Iterator[Entrant]:
    """The host, torch.compile once or twice, and ours twice (a choice of tokens as chosen).

    In a dry run what torch.compile gets is traced, and no code is made.
    """
    case, cuda = sequences.case, gpu.device.type == "cuda"
    compiler = "inductor" if cuda else "eager"
    last = {MLP_ALONE: sequences.contenders[MLP_ALONE]} if MLP_ALONE in sequences.contenders else {}
    for name, bind in sequences.contenders.items():
        if name not in (OURS, OURS_EAGER, *last):
            yield Entrant(name, bind)
    yield Entrant(COMPILED, sequences.compiled(compiler), may_fail=True)
    if isinstance(case, ChoiceCase):
        yield Entrant(OURS, sequences.contenders[OURS])
        return
    if case.form not in PARTIAL_BLOCKS and (gpu.autotune_everywhere or case.size.name in AUTOTUNED_SIZES):
        tuned = sequences.compiled(compiler, "max-autotune-no-cudagraphs")
        yield Entrant(AUTOTUNED, tuned, may_fail=True)
    for name, backend in OUR_BACKENDS.items():
        chosen = backend if cuda else STAND_INS[backend]
        yield Entrant(name, sequences.contenders[OURS], partial(fastcache.use_backend, chosen))
    for name, bind in last.items():
        yield Entrant(name, bind)


if __name__ == "__main__":
    run("kernels", kernels)
