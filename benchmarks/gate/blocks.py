"""Part of the stage `kernels`: partial blocks and the choice of tokens for a whole step, by graph replay."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fastcache
from benchmarks import token_choices, token_sequences
from benchmarks.bandwidth import Bandwidth
from benchmarks.correctness import WrongValues
from benchmarks.forms import Absence, NotMeasured
from benchmarks.gate.contenders import BEST, COMPILED, NAIVE, OUR_BACKENDS, STAND_INS
from benchmarks.gate.stage import Failed, Stage
from benchmarks.graphed import Replay, captured, host_us, launches, measure_replays
from benchmarks.timing import Effort, Timing
from benchmarks.token_cases import SIZES, TINY, BlockCase, ChoiceCase, TokenSize, Work, choice_cases
from benchmarks.tokens import MLP_ALONE, SAME_CHOICE, TENSORS, WORKING, Binder, PreparedBlock, chosen_by
from fastcache.ops import SlotMap

GPU_SIZES = (SIZES[0], TokenSize("N256 B64", 64, 256), *SIZES[1:])
GPU_SHARES = (0.07, 0.25, 0.01, 0.6)  # in order of what they decide
CASE_SECONDS = 6.0  # that must be left to begin a case


@dataclass(frozen=True)
class GateBlockRow:
    """One contender of one partial block (rows: K per sample), or of the choice of a step (rows: the largest K).

    bytes: the least that is moved; gbps: these over the median; share_of_copy: of the copy of this run. vs_*: times
    faster than that contender, None for what is none (`MLP alone`). error: relative RMS, or the share of tokens chosen otherwise.
    """

    case: str
    work: str
    size: str
    rows: int
    contender: str
    bytes: int
    flops: int
    timing: Timing
    gbps: float
    share_of_copy: float
    host_us: float
    launches: int | None
    error: float
    vs_naive: float | None
    vs_compile: float | None


@dataclass(frozen=True)
class Entrant:
    """A contender: its calls on every buffer, its error, and the scope of its backend."""

    calls: list[Callable[[], object]]
    error: float
    scope: Callable[[], AbstractContextManager] = nullcontext


def gate_block_cases(*, dry_run: bool) -> list[BlockCase]:
    """bf16, the stream alone before the whole block, common shares of tokens before rare ones."""
    sizes = (TINY,) if dry_run else GPU_SIZES
    return [
        BlockCase(work, size, share, torch.bfloat16)
        for work in Work
        for share in GPU_SHARES
        for size in sizes
    ]


def gate_choice_cases(*, dry_run: bool) -> list[ChoiceCase]:
    """Every size, 28 layers."""
    return choice_cases((TINY,) if dry_run else GPU_SIZES)


def measure_blocks(
    stage: Stage, device: torch.device, bandwidth: Bandwidth, effort: Effort, seconds: float
) -> None:
    """Choices, then blocks, until `seconds` are spent; what is not reached is in `blocks_absent`."""
    deadline = time.monotonic() + seconds
    stage.put(blocks=[], blocks_absent=[])
    inductor = "inductor" if device.type == "cuda" else "eager"
    compiled = {work: token_sequences.compiled_block(inductor) for work in Work}
    cases: list[ChoiceCase | BlockCase] = [
        *gate_choice_cases(dry_run=stage.dry_run),
        *gate_block_cases(dry_run=stage.dry_run),
    ]
    for number, case in enumerate(cases):
        if not stage.dry_run and time.monotonic() + CASE_SECONDS > deadline:
            stage.add(
                "blocks_absent",
                *(
                    asdict(Absence(late.name, None, "the budget of the blocks was used up"))
                    for late in cases[number:]
                ),
            )
            break
        try:
            entrants, absent = (
                choosers(case, device)
                if isinstance(case, ChoiceCase)
                else takers(case, device, compiled[case.work])
            )
        except (NotMeasured, torch.cuda.OutOfMemoryError) as reason:
            entrants, absent = {}, [Absence(case.name, None, str(reason).splitlines()[0])]
        rows, failed = timed(case, entrants, device, bandwidth, effort)
        absent += failed
        stage.add("blocks_absent", *map(asdict, absent))
        if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
            stage.add("blocks", {"case": case.name, "ran": {row.contender: row.error for row in rows}})
            continue
        stage.add("blocks", *map(asdict, rows))
        stage.say(
            f"{case.name}: "
            + (
                ", ".join(f"{row.contender} {row.timing.median_us:.1f} us" for row in rows)
                or absent[0].reason
            )
        )


def takers(
    case: BlockCase, device: torch.device, compiled: Binder
) -> tuple[dict[str, Entrant], list[Absence]]:
    """Who computes a block, and who does not and why."""
    prepared = PreparedBlock(case, device, **({} if device.type == "cuda" else {"max_copies": 2}))
    eager = lambda sequence: lambda inputs: lambda: sequence(*token_sequences.arguments(inputs))  # noqa: E731
    wanted: list[tuple[str, Binder, Callable[[], AbstractContextManager]]] = [
        (NAIVE, eager(token_sequences.naive_block), nullcontext),
        (BEST, eager(token_sequences.best_block), nullcontext),
        (COMPILED, compiled, nullcontext),
    ]
    absent, entrants = [], {}
    for name, backend in OUR_BACKENDS.items():
        backend = backend if device.type == "cuda" else STAND_INS[backend]
        status = fastcache.backends_status()[backend]
        if status.available:
            wanted.append(
                (name, token_sequences.ours, lambda backend=backend: fastcache.use_backend(backend))
            )
        else:
            absent.append(Absence(case.name, name, status.reason))
    for name, bind, scope in wanted:
        try:
            with scope():
                entrants[name] = Entrant(*prepared.bound_by(name, bind, may_fail=name == COMPILED), scope)
        except WrongValues as reason:
            absent.append(Absence(case.name, name, f"WRONG VALUES: {reason}"))
        except NotMeasured as reason:
            absent.append(Absence(case.name, name, str(reason)))
    if case.work is Work.BLOCK:
        entrants[MLP_ALONE] = Entrant(
            [token_sequences.body_alone(inputs) for inputs in prepared.buffers], 0.0
        )
    return entrants, absent


def choosers(case: ChoiceCase, device: torch.device) -> tuple[dict[str, Entrant], list[Absence]]:
    """Who chooses for a step; ours on the backend that FastCache chooses."""
    exact = chosen_by(token_choices.scored_at_once, token_choices.make_choice(case, device))
    entrants, absent = {}, []
    for name, contender in token_choices.CONTENDERS.items():
        inputs = token_choices.make_choice(case, device)
        otherwise = 1 - float((chosen_by(contender, inputs) == exact).float().mean())
        if otherwise > 1 - SAME_CHOICE:
            absent.append(
                Absence(case.name, name, f"WRONG VALUES: {otherwise:.2%} of the tokens are chosen otherwise")
            )
        else:
            entrants[name] = Entrant([token_choices.bound(name, inputs)], otherwise)
    return entrants, absent


def timed(
    case: BlockCase | ChoiceCase,
    entrants: dict[str, Entrant],
    device: torch.device,
    bandwidth: Bandwidth,
    effort: Effort,
) -> tuple[list[GateBlockRow], list[Absence]]:
    """Rows of the entrants, by replay in turns; who cannot be captured is absent."""
    replays: dict[str, Replay] = {}
    absent = []
    for name, entrant in entrants.items():
        try:
            with entrant.scope():
                replay = captured(entrant.calls, device, 1e-3 * case.min_bytes / bandwidth.copy_gbps)
        except RuntimeError as reason:
            absent.append(Absence(case.name, name, f"{type(reason).__name__}: {str(reason).splitlines()[0]}"))
            continue
        replays[name] = (
            replay
            if device.type == "cuda"
            else Replay(_within(entrant, replay), replay.calls, replay.results)
        )
    if not replays:
        return [], absent
    timings = measure_replays(replays, effort, device)
    block = isinstance(case, BlockCase)
    ratio = lambda other, name: (
        timings[other].median_us / timings[name].median_us if other in timings and name != MLP_ALONE else None
    )  # noqa: E731
    rows = []
    for name in replays:
        entrant = entrants[name]
        own, rate = timings[name], 1e-3 * case.min_bytes / timings[name].median_us
        with entrant.scope():
            cost = host_us(entrant.calls, device), launches(entrant.calls[0], device)
        rows.append(GateBlockRow(
            case.name, case.work.value if block else "choice", case.size.name, case.rows if block else max(case.counts), name, case.min_bytes, case.flops if block else 0,
            own, rate, rate / bandwidth.copy_gbps, *cost, entrant.error, ratio(NAIVE, name), ratio(COMPILED, name),
        ))  # fmt: skip
    return rows, absent


def _within(entrant: Entrant, replay: Replay) -> Callable[[], object]:
    """On a CPU there is no graph: each call runs in the scope of its backend."""

    def call() -> object:
        with entrant.scope():
            return replay.run()

    return call


def check_real_blocks(smallest_gpu: float) -> int:
    """Every real block, with tensors that have shapes and no memory: it must be accepted, and fit into a GPU. Their number."""
    cases = gate_block_cases(dry_run=False)
    for case in cases:
        with FakeTensorMode(), torch.no_grad(), patch("benchmarks.token_sequences.slot_map", _unread_map):
            inputs = token_sequences.make_inputs(case, torch.device("cpu"), nn.Identity())
            token_sequences.ours(inputs)()
        need = (
            TENSORS * case.tensor_bytes
            + 3 * case.weight_bytes
            + WORKING * 8 * case.tensor_bytes // case.dtype.itemsize
        )
        if need > smallest_gpu:
            raise Failed(f"{case.name}: needs {need / 1e9:.0f} GB, a GPU has {smallest_gpu / 1e9:.0f}")
    return len(cases)


def _unread_map(index: torch.Tensor, tokens: int) -> SlotMap:
    return SlotMap(index.new_empty((index.shape[0], tokens), dtype=torch.int32), index.shape[1])
