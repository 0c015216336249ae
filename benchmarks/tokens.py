"""The part `tokens`: partial blocks, with and without their MLP, and the choice of tokens for a whole step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import token_choices, token_sequences
from benchmarks.correctness import WrongValues, relative_rms
from benchmarks.forms import COLD, MAX_COPIES, Absence, NotMeasured, compile_failure
from benchmarks.machine import free_bytes, last_level_cache_bytes
from benchmarks.providers import Provider
from benchmarks.timing import Effort, Timing, measure
from benchmarks.token_cases import BlockCase, ChoiceCase, Work
from benchmarks.token_choices import ChoiceInputs, make_choice
from benchmarks.token_sequences import BlockInputs, arguments, make_inputs, make_mlp
from fastcache.report import OperatorCount

MOST_FLOPS = 6e10  # of a block on a CPU: beyond, one call takes seconds
CHECKED_ROWS = 64  # of a sample, whose MLP is computed in float64
SAME_CHOICE = 0.999  # share of tokens: scores nearer than rounding may be ordered either way
TENSORS = 5  # [B, N, D] that one set of buffers holds at most
WORKING = 10  # float64 tensors [B, N, D] of a check
MLP_ALONE = "MLP alone"
BLOCK_PROVIDERS = (Provider.NAIVE, Provider.BEST_EAGER, Provider.COMPILED, Provider.OURS)

Call = Callable[[], Sequence[Tensor]]
Binder = Callable[[BlockInputs], Call]


@dataclass(frozen=True)
class BlockRow:
    """One contender of one partial block. rows: K per sample; bytes, flops: the least that must be moved and computed.

    floor_us: bytes at the copy bandwidth of the run. vs_*: times faster than that contender. `MLP alone`
    is no contender but what remains where the stream costs nothing.
    """

    case: str
    work: str
    size: str
    rows: int
    share: float
    dtype: str
    provider: str
    threads: int
    bytes: int
    flops: int
    cache: str
    buffers: int
    timing: Timing
    gbps: float
    error: float
    vs_naive: float | None
    vs_best_eager: float | None
    vs_compile: float | None
    floor_us: float | None = None

    def against(self, copy_gbps: float) -> "BlockRow":
        """The row with its floor."""
        return replace(self, floor_us=1e-3 * self.bytes / copy_gbps)


@dataclass(frozen=True)
class ChoiceRow:
    """One contender of the choice of a step: all layers. operators: dispatched by one choice, views excluded."""

    case: str
    size: str
    layers: int
    provider: str
    bytes: int
    operators: int
    timing: Timing
    vs_naive: float
    vs_topk: float
    same: float
    floor_us: float | None = None

    def against(self, copy_gbps: float) -> "ChoiceRow":
        """The row with its floor."""
        return replace(self, floor_us=1e-3 * self.bytes / copy_gbps)


class PreparedBlock:
    """The buffers of a case. Raises NotMeasured if they do not fit into memory."""

    def __init__(
        self, case: BlockCase, device: torch.device, max_copies: int = MAX_COPIES, free: int | None = None
    ) -> None:
        self.case, self.device = case, device
        needed = max(1, -(-COLD * last_level_cache_bytes(device) // max(1, 4 * case.tensor_bytes)))
        copies = min(needed, max_copies)
        free = free_bytes(device) if free is None else free
        need = (
            copies * TENSORS * case.tensor_bytes
            + case.weight_bytes * 3
            + WORKING * 8 * case.tensor_bytes // case.dtype.itemsize
        )
        if free is not None and need > free:
            raise NotMeasured(f"needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        self.cache = "cold" if copies == needed else "warm"
        mlp = make_mlp(case, device)
        self.buffers = [make_inputs(case, device, mlp, seed) for seed in range(copies)]
        self._slot = self.buffers[0].slot.clone()
        wide = replace(self.buffers[0].double(), body=torch.nn.Identity())
        x, h = token_sequences.naive_block(*arguments(wide))
        self._rows = (
            torch.linspace(0, case.rows - 1, min(CHECKED_ROWS, case.rows), device=device).round().long()
        )
        self._exact = x, self.in_double(mlp, h[:, self._rows])

    def in_double(self, mlp: torch.nn.Module, h: Tensor) -> Tensor:
        """What the body makes of some rows."""
        if self.case.work is Work.STREAM:
            return h
        wide = make_mlp(self.case, self.device).double()
        wide.load_state_dict({name: parameter.double() for name, parameter in mlp.state_dict().items()})
        return wide(h)

    def bound_by(self, name: str, bind: Binder, *, may_fail: bool) -> tuple[list[Call], float]:
        """(the call on every buffer, its error). Raises WrongValues; NotMeasured if `may_fail` and the first call does."""
        try:
            calls = [bind(inputs) for inputs in self.buffers]
            if may_fail:
                calls[0]()
        except Exception as failure:
            if not may_fail:
                raise
            raise NotMeasured(compile_failure(failure)) from failure
        return calls, self._checked(name, calls[0])

    def _checked(self, name: str, call: Call) -> float:
        self.buffers[0].slot.copy_(self._slot)
        x, made = call()
        error = max(relative_rms(x, self._exact[0]), relative_rms(made[:, self._rows], self._exact[1]))
        allowed = 16 * torch.finfo(self.case.dtype).eps
        if not error <= allowed:
            raise WrongValues(
                f"{self.case.name}: {name} is off by {error:.2e} (relative RMS against float64), allowed {allowed:.2e}"
            )
        return error


def binders(inductor: str = "inductor") -> dict[Provider, Binder]:
    """Who takes part. One binder serves all cases of a width, so that torch.compile compiles once for them."""
    eager = lambda sequence: lambda inputs: lambda: sequence(*arguments(inputs))  # noqa: E731
    return {
        Provider.NAIVE: eager(token_sequences.naive_block),
        Provider.BEST_EAGER: eager(token_sequences.best_block),
        Provider.COMPILED: token_sequences.compiled_block(inductor),
        Provider.OURS: token_sequences.ours,
    }


def measure_block(
    case: BlockCase,
    device: torch.device,
    effort: Effort,
    contenders: Mapping[Provider, Binder],
    max_copies: int = MAX_COPIES,
) -> tuple[list[BlockRow], list[Absence]]:
    """Check and time the contenders on the same buffers, in turns."""
    if case.flops > MOST_FLOPS:
        return [], [
            Absence(
                case.name,
                None,
                f"its MLP takes more than {MOST_FLOPS / 1e9:.0f} GFLOP a call; see the stream alone",
            )
        ]
    try:
        prepared = PreparedBlock(case, device, max_copies)
    except NotMeasured as reason:
        return [], [Absence(case.name, None, str(reason))]
    calls, errors, absent = {}, {}, []
    for provider, bind in contenders.items():
        try:
            calls[provider.value], errors[provider.value] = prepared.bound_by(
                provider.value, bind, may_fail=provider is Provider.COMPILED
            )
        except NotMeasured as reason:
            absent.append(Absence(case.name, provider.value, str(reason)))
    if case.work is Work.BLOCK:
        calls[MLP_ALONE], errors[MLP_ALONE] = (
            [token_sequences.body_alone(inputs) for inputs in prepared.buffers],
            0.0,
        )
    timings = measure(calls, effort, device)
    return [_block_row(prepared, name, timings, errors[name]) for name in calls], absent


def _block_row(prepared: PreparedBlock, name: str, timings: dict[str, Timing], error: float) -> BlockRow:
    case, own = prepared.case, timings[name]
    ratio = lambda other: (
        timings[other.value].median_us / own.median_us
        if other.value in timings and name != MLP_ALONE
        else None
    )  # noqa: E731
    return BlockRow(
        case.name, case.work.value, case.size.name, case.rows, case.share, str(case.dtype).removeprefix("torch."), name, torch.get_num_threads(), case.min_bytes, case.flops,
        prepared.cache, len(prepared.buffers), own, 1e-3 * case.min_bytes / own.median_us, error, ratio(Provider.NAIVE), ratio(Provider.BEST_EAGER), ratio(Provider.COMPILED),
    )  # fmt: skip


def measure_choice(case: ChoiceCase, device: torch.device, effort: Effort) -> list[ChoiceRow]:
    """Check and time the contenders; each ages tokens of its own, from the same start. Raises WrongValues."""
    exact = chosen_by(token_choices.in_one_launch, make_choice(case, device))
    calls, same, operators = {}, {}, {}
    for name, contender in token_choices.CONTENDERS.items():
        inputs = make_choice(case, device)
        with OperatorCount() as counter:
            found = chosen_by(contender, inputs)
        operators[name] = counter.count - 1  # less the comparison of the ages
        same[name] = float((found == exact).float().mean())
        if not same[name] >= SAME_CHOICE or not torch.equal(found.sum(-1), exact.sum(-1)):
            raise WrongValues(f"{case.name}: {name} chooses otherwise for {1 - same[name]:.2%} of the tokens")
        calls[name] = [token_choices.bound(name, inputs)]
    timings = measure(calls, effort, device)
    median = {name: timing.median_us for name, timing in timings.items()}
    return [
        ChoiceRow(
            case.name,
            case.size.name,
            case.layers,
            name,
            case.min_bytes,
            operators[name],
            timing,
            median[token_choices.NAIVE] / median[name],
            median[token_choices.TOPK] / median[name],
            same[name],
        )
        for name, timing in timings.items()
    ]


def chosen_by(contender: Callable[[ChoiceInputs], list[Tensor]], inputs: ChoiceInputs) -> Tensor:
    """[L, B, N] bool: the tokens that it chose are the ones whose age is zero afterwards."""
    contender(inputs)
    return inputs.ages == 0


def measure_tokens(
    cases: Sequence[BlockCase],
    choices: Sequence[ChoiceCase],
    device: torch.device,
    effort: Effort,
    providers: Sequence[Provider],
    max_copies: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[BlockRow, ...], tuple[ChoiceRow, ...], tuple[Absence, ...]]:
    """Everything, choices first."""
    chosen: list[ChoiceRow] = []
    for choice in choices:
        found = measure_choice(choice, device, effort)
        chosen += found
        say(
            f"tokens: {choice.name}: "
            + ", ".join(f"{row.provider} {row.timing.median_us:.0f} us" for row in found)
        )
    rows, absent = [], []
    for work in Work:
        contenders = {provider: bind for provider, bind in binders().items() if provider in providers}
        for case in (case for case in cases if case.work is work):
            found, missing = measure_block(case, device, effort, contenders, max_copies)
            rows += found
            absent += missing
            say(
                f"tokens: {case.name}: "
                + (
                    ", ".join(f"{row.provider} {row.timing.median_us:.0f} us" for row in found)
                    or missing[0].reason
                )
            )
    return tuple(rows), tuple(chosen), tuple(absent)
