"""Scores, choices and errors of tokens: FastCache against what one writes in PyTorch, and torch.compile of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPE_NAMES, REFRESH_RATIO
from benchmarks.forms import COLD, Absence, compile_failure
from benchmarks.machine import last_level_cache_bytes
from benchmarks.providers import Provider
from benchmarks.timing import Effort, Timing, measure
from fastcache import use_backend
from fastcache.ops import attention_received, relative_error, row_score, select_tokens_, value_norm

Arguments = tuple
LAYERS, SAMPLES, LOOKAHEADS, AGE_WEIGHT = 28, 2, 3, 0.25 / 3
MAX_COPIES = 16


@dataclass(frozen=True)
class OperatorCase:
    """One operator at one size.

    bytes: the least that any implementation reads and writes. plain: as a method's own code writes it;
    best: the fewest launches of eager PyTorch, where that is another sequence. wrapped: the function that
    torch.compile is measured as, from torch.compile. tolerance: what float32 sums in another order explain.
    """

    operator: str
    size: str
    dtype: torch.dtype
    bytes: int
    make: Callable[[torch.Generator], Arguments]
    ours: Callable[..., object]
    plain: Callable[..., object]
    best: Callable[..., object]
    wrapped: Callable[[Callable], Callable]
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        """`row_score-norm-2x256x1152-bf16`."""
        return f"{self.operator}-{self.size}-{DTYPE_NAMES[self.dtype]}"


@dataclass(frozen=True)
class OperatorRow:
    """One contender of one case; vs_*: times faster than that contender, None if it is absent."""

    case: str
    operator: str
    size: str
    dtype: str
    provider: str
    threads: int
    bytes: int
    timing: Timing
    gbps: float
    vs_naive: float | None
    vs_best_eager: float | None
    vs_compile: float | None


class Disagreement(AssertionError):
    """A contender computed something else."""


# --- cases ----------------------------------------------------------------------------------------


def operator_cases(
    lengths: Sequence[int] = (256, 1024, 4096, 23850),
    tokens: Sequence[int] = (256, 4096),
    channels: int = 1152,
    heads: int = 16,
    layers: int = LAYERS,
) -> list[OperatorCase]:
    """Selection for all layers of a step; scores at the sizes of DiT-XL/2; attention up to 1024 tokens."""
    found = [_selection(length, layers) for length in lengths]
    for dtype in (torch.bfloat16, torch.float32):
        found += [
            case
            for count in tokens
            for case in (_norm(count, channels, dtype), _distance(count, channels, dtype))
        ]
        found += [
            _values(tokens[0], heads, channels // heads, dtype),
            _calibration(tokens[0], channels, 2 * layers, dtype),
        ]
    return [*found, *(_attention(min(count, 1024), heads, channels // heads) for count in tokens)]


def _selection(N: int, layers: int) -> OperatorCase:
    R, K = SAMPLES * layers, int(REFRESH_RATIO * N)

    def make(generator: torch.Generator) -> Arguments:
        return (
            torch.rand(R, N, generator=generator),
            torch.randint(0, 4, (R, N), generator=generator, dtype=torch.int32),
            torch.full((R,), K, dtype=torch.int32),
        )

    def batched(score: Tensor, age: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        total = score / score.norm(dim=1, keepdim=True) + AGE_WEIGHT * age
        index = total.topk(K, dim=1, sorted=False).indices.sort(dim=1).values
        slots = torch.full(score.shape, -1, dtype=torch.int32, device=score.device)
        slots.scatter_(
            1, index, torch.arange(K, dtype=torch.int32, device=score.device).expand(len(score), K)
        )
        age.add_(1).scatter_(1, index, 0)
        return slots, index.int()

    def per_layer(score: Tensor, age: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [
            batched(score[i : i + SAMPLES], age[i : i + SAMPLES], counts[i : i + SAMPLES])
            for i in range(0, R, SAMPLES)
        ]

    ours = lambda score, age, counts: select_tokens_(score, age, counts, K, age_weight=AGE_WEIGHT)  # noqa: E731
    return OperatorCase(
        "select_tokens_",
        f"{R}x{N}",
        torch.float32,
        16 * R * N + 4 * R * (K + 1),
        make,
        ours,
        per_layer,
        batched,
        lambda compiled: compiled(batched),
        0.0,
    )


def _norm(N: int, D: int, dtype: torch.dtype) -> OperatorCase:
    plain = lambda x: x.float().norm(dim=-1)  # noqa: E731
    best = lambda x: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)  # noqa: E731
    return OperatorCase(
        "row_score",
        f"norm-{SAMPLES}x{N}x{D}",
        dtype,
        SAMPLES * N * (D * dtype.itemsize + 4),
        lambda g: (_normal(g, dtype, SAMPLES, N, D),),
        row_score,
        plain,
        best,
        lambda compiled: compiled(plain),
    )


def _distance(N: int, D: int, dtype: torch.dtype) -> OperatorCase:
    plain = lambda x, y: 1 - F.cosine_similarity(x.float(), y.float(), dim=-1)  # noqa: E731
    make = lambda g: (_normal(g, dtype, SAMPLES, N, D), _normal(g, dtype, SAMPLES, N, D))  # noqa: E731
    return OperatorCase(
        "row_score",
        f"cosine-{SAMPLES}x{N}x{D}",
        dtype,
        SAMPLES * N * (2 * D * dtype.itemsize + 4),
        make,
        row_score,
        plain,
        plain,
        lambda compiled: compiled(plain),
    )


def _values(N: int, heads: int, d: int, dtype: torch.dtype) -> OperatorCase:
    plain = lambda v: (1 - v.float().norm(dim=-1)).sum(1)  # noqa: E731
    make = lambda g: (_normal(g, dtype, SAMPLES, N, 3, heads, d).permute(2, 0, 3, 1, 4)[2],)  # noqa: E731
    return OperatorCase(
        "value_norm",
        f"{SAMPLES}x{heads}x{N}x{d}",
        dtype,
        SAMPLES * N * (heads * d * dtype.itemsize + 4),
        make,
        value_norm,
        plain,
        plain,
        lambda compiled: compiled(plain),
    )


def _calibration(N: int, D: int, layers: int, dtype: torch.dtype) -> OperatorCase:
    def make(generator: torch.Generator) -> Arguments:
        return [_normal(generator, dtype, SAMPLES, N, D) for _ in range(layers)], [
            _normal(generator, dtype, SAMPLES, N, D) for _ in range(LOOKAHEADS * layers)
        ]

    def pair(old: Tensor, new: Tensor) -> Tensor:
        return (old.float() - new.float()).abs().sum() / new.float().abs().sum()

    def looped(pair: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        return lambda newest, earlier: torch.stack(
            [pair(old, newest[j % layers]) for j, old in enumerate(earlier)]
        ).view(-1, layers)

    size = (1 + LOOKAHEADS) * layers * SAMPLES * N * D * dtype.itemsize
    return OperatorCase(
        "relative_error",
        f"{LOOKAHEADS}x{layers}x{SAMPLES}x{N}x{D}",
        dtype,
        size,
        make,
        relative_error,
        looped(pair),
        looped(pair),
        lambda compiled: looped(compiled(pair)),
        1e-4,
    )


def _attention(N: int, heads: int, d: int) -> OperatorCase:
    plain = lambda q, k: torch.matmul(q * d**-0.5, k.transpose(-1, -2)).softmax(-1).mean(1).sum(1)  # noqa: E731
    make = lambda g: (
        _normal(g, torch.float32, SAMPLES, heads, N, d),
        _normal(g, torch.float32, SAMPLES, heads, N, d),
    )  # noqa: E731
    return OperatorCase(
        "attention_received",
        f"{SAMPLES}x{heads}x{N}x{d}",
        torch.float32,
        4 * SAMPLES * (2 * heads * N * d + N),
        make,
        attention_received,
        plain,
        plain,
        lambda compiled: compiled(plain),
        1e-4,
    )


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


# --- measuring ------------------------------------------------------------------------------------


def measure_operators(
    cases: Sequence[OperatorCase],
    device: torch.device,
    effort: Effort,
    providers: Sequence[Provider] = tuple(Provider),
    say: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[OperatorRow, ...], tuple[Absence, ...]]:
    """Compare and time every contender of every case, on the same buffers, in turns."""
    rows, absent = [], []
    for case in cases:
        found, missing = measure_token_case(case, device, effort, providers)
        rows += found
        absent += missing
        ours = next(row for row in found if row.provider == Provider.OURS.value)
        say(f"{case.name}: {ours.timing.median_us:.0f} us, {ours.gbps:.1f} GB/s, {ours.vs_naive:.2f}x naive")
    return tuple(rows), tuple(absent)


def measure_token_case(
    case: OperatorCase, device: torch.device, effort: Effort, providers: Sequence[Provider]
) -> tuple[list[OperatorRow], list[Absence]]:
    """One case; raises Disagreement if a contender computes something else than the definition."""
    copies = max(1, min(MAX_COPIES, -(-COLD * last_level_cache_bytes(device) // max(1, case.bytes))))
    buffers = [_on(device, case.make(torch.Generator().manual_seed(seed))) for seed in range(copies)]
    contenders, absent = {}, []
    for provider in providers:
        call = _call(case, provider)
        try:
            check(case, provider, call, buffers[0])
        except Disagreement:
            raise
        except Exception as failure:
            if provider is not Provider.COMPILED:
                raise
            absent.append(Absence(case.name, provider.value, compile_failure(failure)))
            continue
        contenders[provider] = [partial(call, *arguments) for arguments in buffers]
    timings = measure(contenders, effort, device)
    return [_row(case, provider, timings) for provider in contenders], absent


def check(case: OperatorCase, provider: Provider, call: Callable[..., object], arguments: Arguments) -> None:
    """Raise Disagreement if a contender computes something else than the definition.

    FastCache must choose exactly its tokens. torch.topk breaks ties as it likes, and a norm of another
    rounding moves scores by a unit: 1 in 1000 tokens may be others.
    """
    found, expected = call(*_copied(arguments)), _call(case, Provider.OURS_EAGER)(*_copied(arguments))
    if case.operator == "select_tokens_":
        chosen = [
            torch.cat([slots for slots, _ in (result if isinstance(result, list) else [result])]) >= 0
            for result in (found, expected)
        ]
        off = float((chosen[0] != chosen[1]).double().mean())
        allowed = 0.0 if provider is Provider.OURS else 1e-3
    else:
        off = float(((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max())
        allowed = case.tolerance
    if not off <= allowed:
        raise Disagreement(f"{case.name}: {provider.value} is off by {off:.3g}, allowed are {allowed:.3g}")


def _call(case: OperatorCase, provider: Provider) -> Callable[..., object]:
    if provider is Provider.COMPILED:
        torch.compiler.reset()
        return case.wrapped(partial(torch.compile, fullgraph=True, dynamic=False))
    if provider is Provider.OURS_EAGER:
        return partial(_eager, case.ours)
    return {Provider.NAIVE: case.plain, Provider.BEST_EAGER: case.best, Provider.OURS: case.ours}[provider]


def _eager(call: Callable[..., object], *arguments: object) -> object:
    with use_backend("eager"):
        return call(*arguments)


def _row(case: OperatorCase, provider: Provider, timings: dict[Provider, Timing]) -> OperatorRow:
    own = timings[provider]
    ratio: Callable[[Provider], float | None] = lambda other: (
        timings[other].median_us / own.median_us if other in timings else None
    )  # noqa: E731
    return OperatorRow(
        case.name, case.operator, case.size, DTYPE_NAMES[case.dtype], provider.value, torch.get_num_threads(), case.bytes, own, 1e-3 * case.bytes / own.median_us,
        ratio(Provider.NAIVE), ratio(Provider.BEST_EAGER), ratio(Provider.COMPILED),
    )  # fmt: skip


def _on(device: torch.device, arguments: Arguments) -> Arguments:
    return tuple(
        [tensor.to(device) for tensor in argument] if isinstance(argument, list) else argument.to(device)
        for argument in arguments
    )


def _copied(arguments: Arguments) -> Arguments:
    return tuple(argument if isinstance(argument, list) else argument.clone() for argument in arguments)
