"""Choices, scores and errors of tokens, and a call's dispatch: what one writes in PyTorch, and FastCache.

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
from fastcache import ops
from fastcache.policies import ToCa
from fastcache.policies.toca import DIT
from fastcache.schedule import Score, Selection

POLICY = ToCa(fresh_threshold=3)
AGE_WEIGHT = POLICY.soft_fresh_weight / POLICY.fresh_threshold
SELECTION = Selection(Score.ATTENTION, AGE_WEIGHT, DIT.cell, DIT.bonus)
SAMPLES, LOOKAHEADS = 2, 3
CALLS = 100  # of dispatch in one sample: shorter than the time slice of another process

# --- choices -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """scores [L, B, N] float32; ages [L, B, N] int32, written; counts: K per layer; device_counts [L * B]."""

    scores: Tensor
    ages: Tensor
    counts: tuple[int, ...]
    device_counts: Tensor


def sorted_per_layer(i: Choice) -> list[Tensor]:
    """The original: all of it per layer, and a whole sort."""
    layers = zip(i.scores, i.ages, i.counts, strict=True)
    return [choose(F.normalize(one, dim=-1), ages, K, SELECTION, POLICY.fields()) for one, ages, K in layers]


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
    return ops.select_tokens_(scores, ages, i.device_counts, max(i.counts), age_weight=AGE_WEIGHT, **bonus)


class ChoiceSequences(Sequences):
    """The tokens that a contender chose are the ones whose age is zero afterwards."""

    allowed = 1e-3  # share of the tokens: scores nearer than rounding may be ordered either way

    def __init__(self, case: ChoiceCase) -> None:
        super().__init__(case)
        found = {NAIVE: sorted_per_layer, BEST: scored_at_once, OURS: in_one_launch}
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


# --- scores, errors and dispatch -----------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorCase:
    """One operator on tensors of `shapes` (lists of shapes are lists of tensors).

    plain: as a method writes it. best: the fewest launches of eager PyTorch, plain if None. wrapped: what
    torch.compile is measured as, from torch.compile; of plain if None.
    """

    label: str
    size: Size
    dtype: torch.dtype
    min_bytes: int
    shapes: tuple
    ours: Callable[..., Tensor] = field(repr=False)
    plain: Callable[..., Tensor] = field(repr=False)
    best: Callable[..., Tensor] | None = field(default=None, repr=False)
    wrapped: Callable[[Callable], Callable] | None = field(default=None, repr=False)
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


def _on_arguments(call: Callable[..., Tensor]) -> Binder:
    return lambda arguments: partial(call, *arguments)


class OperatorSequences(Sequences):
    """FastCache's eager definition is what every contender must give."""

    def __init__(self, case: OperatorCase) -> None:
        super().__init__(case)
        self.allowed = case.allowed
        found = {NAIVE: case.plain, BEST: case.best or case.plain, OURS: case.ours}
        bound = {name: _on_arguments(call) for name, call in found.items()}
        self.contenders = bound | {OURS_EAGER: partial(within_eager, bound[OURS])}

    def make(self, device: torch.device, seed: int = 0) -> tuple:
        generator = torch.Generator().manual_seed(seed)

        def made(shape: tuple | list) -> Tensor | list[Tensor]:
            if isinstance(shape, list):
                return [made(one) for one in shape]
            return torch.randn(shape, generator=generator).to(device, self.case.dtype)

        return tuple(made(shape) for shape in self.case.shapes)

    def compiled(self, backend: str = "inductor", mode: str | None = None) -> Binder:
        torch.compiler.reset()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
        wrapped = self.case.wrapped or (lambda to: to(self.case.plain))
        return _on_arguments(wrapped(compiled))

    def exact(self, operands: tuple) -> Outputs:
        return (self.contenders[OURS_EAGER](operands)(),)


def operator_cases(
    tokens: Sequence[int] = (256, 4096), channels: int = 1152, heads: int = 16, layers: int = LAYERS
) -> list[OperatorCase]:
    """Scores at the sizes of DiT-XL/2, errors of calibration, and attention up to 1024 tokens."""
    found, head = [], channels // heads
    best_norm = partial(torch.linalg.vector_norm, dim=-1, dtype=torch.float32)
    values = lambda call: lambda qkv: call(qkv.permute(2, 0, 3, 1, 4)[2])
    for dtype in (torch.bfloat16, torch.float32):
        row = channels * dtype.itemsize
        for N in tokens:
            shape, what = (SAMPLES, N, channels), f"{SAMPLES}x{N}x{channels}"
            size, moved = ("row_score", Size(f"norm-{what}", *shape)), SAMPLES * N * (row + 4)
            found.append(OperatorCase(*size, dtype, moved, (shape,), ops.row_score, _norm, best_norm))
            size, moved = ("row_score", Size(f"cosine-{what}", *shape)), SAMPLES * N * (2 * row + 4)
            found.append(OperatorCase(*size, dtype, moved, (shape, shape), ops.row_score, _distance))
        N, shape = tokens[0], (SAMPLES, tokens[0], 3, heads, head)
        size = "value_norm", Size(f"{SAMPLES}x{heads}x{N}x{head}", SAMPLES, N, channels)
        calls = values(ops.value_norm), values(_value_norm)
        found.append(OperatorCase(*size, dtype, SAMPLES * N * (row + 4), (shape,), *calls))
        found.append(_calibration(N, channels, 2 * layers, dtype))
    for N in (min(count, 1024) for count in tokens):
        shape, moved = (SAMPLES, heads, N, head), 4 * SAMPLES * (2 * channels * N + N)
        size = "attention_received", Size("x".join(map(str, shape)), SAMPLES, N, channels), torch.float32
        calls = {"ours": ops.attention_received, "plain": _received, "allowed": 1e-4}
        found.append(OperatorCase(*size, moved, (shape, shape), **calls))
    return found


def _norm(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(x.float(), y.float(), dim=-1)


def _value_norm(v: Tensor) -> Tensor:
    return (1 - v.float().norm(dim=-1)).sum(1)


def _received(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1).mean(1).sum(1)


def _relative(old: Tensor, new: Tensor) -> Tensor:
    return (old.float() - new.float()).abs().sum() / new.float().abs().sum()


def _calibration(N: int, D: int, layers: int, dtype: torch.dtype) -> OperatorCase:
    """Errors of earlier features of all layers, several look-aheads each, in one call."""

    def looped(pair: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def loop(newest: list[Tensor], earlier: list[Tensor]) -> Tensor:
            errors = [pair(old, newest[j % layers]) for j, old in enumerate(earlier)]
            return torch.stack(errors).view(-1, layers)

        return loop

    shape = (SAMPLES, N, D)
    shapes = [shape] * layers, [shape] * layers * LOOKAHEADS
    size = Size(f"{LOOKAHEADS}x{layers}x{SAMPLES}x{N}x{D}", *shape)
    moved, what = (1 + LOOKAHEADS) * layers * size.elements * dtype.itemsize, ("relative_error", size, dtype)
    calls = ops.relative_error, looped(_relative), None, lambda to: looped(to(_relative)), 1e-4
    return OperatorCase(*what, moved, shapes, *calls)


def dispatch_case() -> OperatorCase:
    """What calls cost before they move any bytes: a gated update of 256 numbers, CALLS times."""

    def repeated(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def calls(*arguments: Tensor) -> Tensor:
            for _ in range(CALLS):
                result = call(*arguments)
            return result

        return calls

    plain = lambda x, feature, gate: x + gate[:, None] * feature
    best = lambda x, feature, gate: torch.addcmul(x, gate[:, None], feature)
    ours = lambda x, feature, gate: ops.residual_update(x, feature, gate).x
    what, shapes = ("dispatch", Size(f"{CALLS} calls", 1, 4, 64)), ((1, 4, 64), (1, 4, 64), (1, 64))
    calls = *map(repeated, (ours, plain, best)), lambda to: repeated(to(plain))
    return OperatorCase(*what, torch.float32, 4 * CALLS * 13 * 64, shapes, *calls)
