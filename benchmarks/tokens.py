"""Choices, scores and calibration errors of tokens: what one writes in PyTorch, and FastCache.

A choice normalises, ages and gives the bonus of ToCa on a DiT, writes the ages, and makes what its refresh
needs: indices [B, K] per layer, or (topk and ours) slot maps too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import DTYPE_NAMES, LAYERS, ChoiceCase, Size
from benchmarks.originals import choose, with_bonus
from benchmarks.sequences import BEST, NAIVE, OURS, OURS_EAGER, Binder, Outputs, Sequences, within_eager
from fastcache.ops import attention_received, relative_error, row_score, select_tokens_, value_norm
from fastcache.policies import ToCa
from fastcache.policies.toca import DIT
from fastcache.schedule import Score, Selection

POLICY = ToCa(fresh_threshold=3)
AGE_WEIGHT = POLICY.soft_fresh_weight / POLICY.fresh_threshold
SELECTION = Selection(Score.ATTENTION, AGE_WEIGHT, DIT.cell, DIT.bonus)
TOPK = "topk per layer"
SAMPLES, LOOKAHEADS = 2, 3

# --- choices -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """scores [L, B, N] float32; ages [L, B, N] int32, written; counts: K per layer; device_counts: [L *
    B]."""

    scores: Tensor
    ages: Tensor
    counts: tuple[int, ...]
    device_counts: Tensor


def sorted_per_layer(i: Choice) -> list[Tensor]:
    """The original: all of it per layer, and a whole sort."""
    layers = zip(i.scores, i.ages, i.counts, strict=True)
    return [choose(F.normalize(one, dim=-1), ages, K, SELECTION, POLICY.fields()) for one, ages, K in layers]


def topk_per_layer(i: Choice) -> list[Tensor]:
    """The original's scores, torch.topk for the sort, and a slot map."""
    layers = zip(i.scores, i.ages, i.counts, strict=True)
    return [_taken(_scored(score, ages), ages.add_(1), count) for score, ages, count in layers]


def scored_at_once(i: Choice, scored: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Tensor]:
    """Scores of all layers in common operators; torch.topk, slot map and ages per layer, whose K differ."""
    score = (scored or _scored)(i.scores.flatten(0, 1), i.ages.flatten(0, 1)).view_as(i.scores)
    i.ages.add_(1)
    return [_taken(one, ages, count) for one, ages, count in zip(score, i.ages, i.counts, strict=True)]


def _scored(score: Tensor, ages: Tensor) -> Tensor:
    aged = torch.add(F.normalize(score, dim=-1), ages, alpha=AGE_WEIGHT)
    return with_bonus(aged, SELECTION.cell, SELECTION.bonus)


def _taken(score: Tensor, ages: Tensor, count: int) -> Tensor:
    chosen = score.topk(count, dim=-1, sorted=False).indices
    ages.scatter_(1, chosen, 0)
    rows = torch.arange(count, dtype=torch.int32, device=score.device).expand_as(chosen)
    return torch.full(score.shape, -1, dtype=torch.int32, device=score.device).scatter_(1, chosen, rows)


def in_one_launch(i: Choice) -> Outputs:
    """Ours."""
    scores, ages, side = i.scores.flatten(0, 1), i.ages.flatten(0, 1), round(i.scores.shape[-1] ** 0.5)
    bonus = {"width": side, "cell": SELECTION.cell, "bonus": SELECTION.bonus}
    return select_tokens_(scores, ages, i.device_counts, max(i.counts), age_weight=AGE_WEIGHT, **bonus)


class ChoiceSequences(Sequences):
    """The tokens that a contender chose are the ones whose age is zero afterwards."""

    allowed = 1e-3  # share of the tokens: scores nearer than rounding may be ordered either way

    def __init__(self, case: ChoiceCase) -> None:
        super().__init__(case)
        found = {NAIVE: sorted_per_layer, TOPK: topk_per_layer, BEST: scored_at_once, OURS: in_one_launch}
        self.contenders = {name: partial(partial, call) for name, call in found.items()}

    def make(self, device: torch.device, seed: int = 0) -> Choice:
        """Scores of one size that differ from token to token by more than rounding, and ages of 0 to 2."""
        generator, case = torch.Generator(device).manual_seed(seed), self.case
        shape = (case.layers, case.size.batch, case.size.tokens)
        order = torch.rand(shape, generator=generator, device=device).argsort(-1)
        ages = torch.randint(0, 3, shape, generator=generator, device=device, dtype=torch.int32)
        counts = torch.tensor(case.counts, dtype=torch.int32, device=device)
        repeated = counts.repeat_interleave(case.size.batch)
        return Choice(1 + order / case.size.tokens, ages, tuple(case.counts), repeated)

    def compiled(self, backend: str = "inductor", mode: str | None = None) -> Binder:
        torch.compiler.reset()
        made = torch.compile(_scored, fullgraph=True, dynamic=False, backend=backend)
        return lambda i: partial(scored_at_once, i, made)  # topk of 28 different K compiles for a minute

    def written(self, i: Choice) -> Outputs:
        return (i.ages,)

    def exact(self, i: Choice) -> Outputs:
        copied = Choice(i.scores, i.ages.clone(), i.counts, i.device_counts)
        within_eager(partial(partial, in_one_launch), copied)()
        return (copied.ages == 0,)

    def seen(self, i: Choice, result: object) -> Outputs:
        return (i.ages == 0,)

    def off(self, found: Tensor, exact: Tensor) -> float:
        right = torch.equal(found.sum(-1), exact.sum(-1))
        return float((found != exact).float().mean()) if right else float("inf")


# --- scores and errors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorCase:
    """One operator at one size. min_bytes: the least that any implementation reads and writes.

    plain: as a method's own code writes it; best: the fewest launches of eager PyTorch. wrapped: what
    torch.compile is measured as, from torch.compile.
    """

    label: str
    size: Size
    dtype: torch.dtype
    min_bytes: int
    make: Callable[[torch.Generator], tuple]
    ours: Callable[..., Tensor] = field(repr=False)
    plain: Callable[..., Tensor] = field(repr=False)
    best: Callable[..., Tensor] = field(repr=False)
    wrapped: Callable[[Callable], Callable] = field(repr=False)
    allowed: float = 1e-5  # what float32 sums in another order explain
    flops, rows = 0, 0

    @property
    def name(self) -> str:
        """`row_score-norm-2x256x1152-bf16`."""
        return f"{self.label}-{self.size.name}-{DTYPE_NAMES[self.dtype]}"

    @property
    def operand_bytes(self) -> int:
        """Nearly all that is moved is read."""
        return self.min_bytes

    working_bytes = operand_bytes


class OperatorSequences(Sequences):
    """FastCache's eager definition is what every contender must give."""

    def __init__(self, case: OperatorCase) -> None:
        super().__init__(case)
        self.allowed = case.allowed
        found = {NAIVE: case.plain, BEST: case.best, OURS: case.ours}
        bound = {name: partial(_on_arguments, call) for name, call in found.items()}
        self.contenders = bound | {OURS_EAGER: partial(within_eager, bound[OURS])}

    def make(self, device: torch.device, seed: int = 0) -> tuple:
        made = self.case.make(torch.Generator().manual_seed(seed))
        return tuple(
            [one.to(device) for one in part] if isinstance(part, list) else part.to(device) for part in made
        )

    def compiled(self, backend: str = "inductor", mode: str | None = None) -> Binder:
        torch.compiler.reset()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        return partial(_on_arguments, self.case.wrapped(compiled))

    def exact(self, operands: tuple) -> Outputs:
        return (self.contenders[OURS_EAGER](operands)(),)


def _on_arguments(call: Callable[..., Tensor], arguments: tuple) -> Callable[[], Tensor]:
    return partial(call, *arguments)


def operator_cases(
    tokens: Sequence[int] = (256, 4096), channels: int = 1152, heads: int = 16, layers: int = LAYERS
) -> list[OperatorCase]:
    """Scores at the sizes of DiT-XL/2, errors of calibration, and attention up to 1024 tokens."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for count in tokens:
            found += [_norm(count, channels, dtype), _distance(count, channels, dtype)]
        found.append(_values(tokens[0], heads, channels // heads, dtype))
        found.append(_calibration(tokens[0], channels, 2 * layers, dtype))
    return [*found, *(_attention(min(count, 1024), heads, channels // heads) for count in tokens)]


def _norm(N: int, D: int, dtype: torch.dtype) -> OperatorCase:
    def plain(x: Tensor) -> Tensor:
        return x.float().norm(dim=-1)

    def best(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)

    size, moved = Size(f"norm-{SAMPLES}x{N}x{D}", SAMPLES, N, D), SAMPLES * N * (D * dtype.itemsize + 4)
    make = partial(_normal, dtype, (SAMPLES, N, D))
    return OperatorCase("row_score", size, dtype, moved, make, row_score, plain, best, lambda to: to(plain))


def _distance(N: int, D: int, dtype: torch.dtype) -> OperatorCase:
    def plain(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x.float(), y.float(), dim=-1)

    size, moved = Size(f"cosine-{SAMPLES}x{N}x{D}", SAMPLES, N, D), SAMPLES * N * (2 * D * dtype.itemsize + 4)
    make = partial(_normal, dtype, (SAMPLES, N, D), (SAMPLES, N, D))
    return OperatorCase("row_score", size, dtype, moved, make, row_score, plain, plain, lambda to: to(plain))


def _values(N: int, heads: int, d: int, dtype: torch.dtype) -> OperatorCase:
    def plain(v: Tensor) -> Tensor:
        return (1 - v.float().norm(dim=-1)).sum(1)

    def make(generator: torch.Generator) -> tuple[Tensor]:
        (qkv,) = _normal(dtype, (SAMPLES, N, 3, heads, d), generator)
        return (qkv.permute(2, 0, 3, 1, 4)[2],)

    size = Size(f"{SAMPLES}x{heads}x{N}x{d}", SAMPLES, N, heads * d)
    moved = SAMPLES * N * (heads * d * dtype.itemsize + 4)
    return OperatorCase(
        "value_norm", size, dtype, moved, make, value_norm, plain, plain, lambda to: to(plain)
    )


def _calibration(N: int, D: int, layers: int, dtype: torch.dtype) -> OperatorCase:
    def make(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        made = _normal(dtype, *[(SAMPLES, N, D)] * (1 + LOOKAHEADS) * layers, generator)
        return list(made[:layers]), list(made[layers:])

    def pair(old: Tensor, new: Tensor) -> Tensor:
        return (old.float() - new.float()).abs().sum() / new.float().abs().sum()

    def looped(pair: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        def loop(newest: list[Tensor], earlier: list[Tensor]) -> Tensor:
            return torch.stack([pair(old, newest[j % layers]) for j, old in enumerate(earlier)]).view(
                -1, layers
            )

        return loop

    size = Size(f"{LOOKAHEADS}x{layers}x{SAMPLES}x{N}x{D}", SAMPLES, N, D)
    moved, plain = (1 + LOOKAHEADS) * layers * SAMPLES * N * D * dtype.itemsize, looped(pair)
    calls = (relative_error, plain, plain, lambda compiled: looped(compiled(pair)))
    return OperatorCase("relative_error", size, dtype, moved, make, *calls, allowed=1e-4)


def _attention(N: int, heads: int, d: int) -> OperatorCase:
    def plain(q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q * d**-0.5, k.transpose(-1, -2)).softmax(-1).mean(1).sum(1)

    shape = (SAMPLES, heads, N, d)
    size, moved = (
        Size("x".join(map(str, shape)), SAMPLES, N, heads * d),
        4 * SAMPLES * (2 * heads * N * d + N),
    )
    calls = (attention_received, plain, plain, lambda to: to(plain))
    make = partial(_normal, torch.float32, shape, shape)
    return OperatorCase("attention_received", size, torch.float32, moved, make, *calls, allowed=1e-4)


def _normal(dtype: torch.dtype, *given) -> tuple[Tensor, ...]:
    """Tensors of the given shapes; last comes the generator."""
    *shapes, generator = given
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
