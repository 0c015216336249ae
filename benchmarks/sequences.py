"""How a case is computed: by the host's own op sequence, by the best eager PyTorch, and by FastCache.

`naive_*` are the sequences of the models and caching methods themselves, in the dtype of x; torch.compile
gets these. `best_*` use the fused calls of PyTorch that a careful host could. Shapes: x, features, slot [B,
N, D]; gate, shift, scale [B, D]; indices [B, K]. What is computed is in `cases.Form`. All return new
tensors and leave their arguments alone, a `slot` excepted.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import MODULATING, PARTIAL_BLOCKS, REFRESHING, WRITING, Case, Form
from benchmarks.operands import DISTANCE, Operands, make_mlp, make_operands
from fastcache import use_backend
from fastcache.ops import Norm, residual_update, residual_update_scatter_

Outputs = tuple[Tensor, ...]
Sum = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Outputs]
Call = Callable[[], object]
Binder = Callable[..., Call]  # operands to a call without arguments

NAIVE, BEST, COMPILED = "naive", "best eager", "torch.compile"
AUTOTUNED = "torch.compile autotuned"
COMPARED = {"vs_naive": NAIVE, "vs_best_eager": BEST, "vs_compile": COMPILED, "vs_autotuned": AUTOTUNED}
OURS = "fastcache"  # on the backend that FastCache chooses
OURS_EAGER = "fastcache eager"  # its definition, for reference
MLP_ALONE = "MLP alone"  # no contender, but what remains where the stream costs nothing
ROWS = 1024  # of a batch, evenly spaced, that are compared where every token is on its own

# --- the host ------------------------------------------------------------------------------------------


def naive_trunk(x: Tensor, features: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    for feature, gate in zip(features, gates, strict=True):
        x = x + gate[:, None] * feature
    return (x,)


def best_trunk(x: Tensor, features: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    total = torch.addcmul(x, gates[0][:, None], features[0])
    for feature, gate in zip(features[1:], gates[1:], strict=True):
        total.addcmul_(gate[:, None], feature)
    return (total,)


def naive_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None],)


def best_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """With one sample, shift and scale are the LayerNorm's own affine part; else it takes a second launch."""
    if len(x) == 1:
        return (F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps=1e-6),)
    return (torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None]),)


def naive_forecast(x: Tensor, differences: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    """sum_k D_k distance^k / k!, as TaylorSeer sums it."""
    prediction = 0
    for order, difference in enumerate(differences):
        prediction = prediction + (1 / math.factorial(order)) * difference * DISTANCE**order
    return naive_trunk(x, [prediction], gates[:1])


def best_forecast(x: Tensor, differences: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    prediction = torch.add(differences[0], differences[1], alpha=DISTANCE)
    for order, difference in enumerate(differences[2:], start=2):
        prediction.add_(difference, alpha=DISTANCE**order / math.factorial(order))
    return best_trunk(x, [prediction], gates[:1])


def update_modulate(sums: Sum, modulate: Callable[..., Outputs], x, features, gates, shift, scale) -> Outputs:
    (x,) = sums(x, features, gates)
    return (x, *modulate(x, shift, scale))


def store(sums: Sum, x: Tensor, slot: Tensor, fresh: Tensor, gates: Sequence[Tensor]) -> Outputs:
    slot.copy_(fresh)
    return sums(x, [fresh], gates)


def refresh(sums: Sum, modulate, x, features, gates, slot, fresh, fresh_index, row_index, shift, scale, body):
    """From where a body has its fresh rows to where the next one has."""
    slot.scatter_(1, fresh_index[..., None].expand_as(fresh), fresh)
    (x,) = sums(x, [slot, *features], gates)
    (h,) = modulate(x.gather(1, row_index[..., None].expand(-1, -1, x.shape[-1])), shift, scale)
    return x, h if body is None else body(h)


def host(form: Form) -> tuple[Callable[[Operands], tuple], Callable[..., Outputs], Callable[..., Outputs]]:
    """(its operands in order, the naive sequence, the best one)."""
    naive, best = (naive_trunk, naive_modulate), (best_trunk, best_modulate)
    if form in REFRESHING:
        names = "x features gates slot fresh fresh_index row_index shift scale body"
        return attrgetter(*names.split()), partial(refresh, *naive), partial(refresh, *best)
    if form.order:
        return attrgetter("x", "features", "gates"), naive_forecast, best_forecast
    if form is Form.MODULATE:
        return attrgetter("x", "shift", "scale"), naive[1], best[1]
    if form in MODULATING:
        names = attrgetter("x", "features", "gates", "shift", "scale")
        return names, partial(update_modulate, *naive), partial(update_modulate, *best)
    if form is Form.STORE:
        names = attrgetter("x", "slot", "fresh", "gates")
        return names, partial(store, naive_trunk), partial(store, best_trunk)
    return attrgetter("x", "features", "gates"), naive_trunk, best_trunk


# --- FastCache -----------------------------------------------------------------------------------------


def ours(form: Form, i: Operands) -> Call:
    """The public function, in one launch; a partial block calls its body after it."""
    modulated = {"norm": Norm.LAYER, "shift": i.shift, "scale": i.scale}
    if form is Form.TRUNK:
        return partial(residual_update, i.x, i.features, i.table, gate_index=i.gate_index)
    if form is Form.STORE:
        return partial(residual_update_scatter_, i.x, i.slot, i.fresh, gates=i.gate)
    if form in REFRESHING:
        partial_block = form in PARTIAL_BLOCKS
        gates = {"gates": i.table, "gate_index": i.gate_index} if partial_block else {"gates": i.gate}
        rows = {"row_slots": i.row_slots, "row_count": i.row_index.shape[1]}
        scatter = partial(residual_update_scatter_, i.x, i.slot, i.fresh, i.fresh_slots, list(i.features))
        launch = partial(scatter, position=0, **gates, **modulated, **rows)
        return partial(_with_body, launch, i.body) if partial_block else launch
    if form.order:
        return partial(residual_update, i.x, i.features, i.gate, weights=i.weights)
    if form is Form.MODULATE:
        return partial(residual_update, i.x, (), **modulated, need_x=False)
    update = partial(residual_update, i.x, i.features[0], i.gate)
    return update if form is Form.UPDATE else partial(update, **modulated)


def _with_body(launch: Call, body: nn.Module) -> Outputs:
    updated = launch()
    return updated.x, body(updated.h)


# --- everybody -----------------------------------------------------------------------------------------


class Sequences:
    """Who computes a case, and what counts as the same result: at most `allowed` is off.

    A kind of case adds `make(device, seed)`, the operands of one call; `exact(operands)`, what every
    contender must give; and `compiled(backend, mode)`, a binder of the naive sequence by torch.compile.
    """

    allowed: float
    contenders: dict[str, Binder]

    def __init__(self, case) -> None:
        self.case = case

    def written(self, operands) -> Outputs:
        """Operands that a call writes."""
        return ()

    def seen(self, operands, result) -> Outputs:
        """What is compared of a call."""
        return (result,)

    def off(self, found: Tensor, exact: Tensor) -> float:
        """The error of an output."""
        return relative_rms(found, exact)


class FormSequences(Sequences):
    """The residual forms. Forms that mix tokens are compared whole, others in some rows."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if case.form not in PARTIAL_BLOCKS:
            torch.compiler.reset()  # graphs of this case alone: no recompile limit, no dynamic shapes
        self._arguments, self._naive, self._best = host(case.form)
        self._body: nn.Module | None = None
        naive, best, own = self._eagerly(self._naive), self._eagerly(self._best), partial(ours, case.form)
        self.contenders = {NAIVE: naive, BEST: best, OURS: own}
        if case.form not in PARTIAL_BLOCKS:
            self.contenders[OURS_EAGER] = partial(within_eager, own)
        if case.form is Form.BLOCK:
            self.contenders[MLP_ALONE] = lambda i: lambda: (i.fresh, i.body(i.fresh))
        self.allowed = allowed_error(case)

    def _eagerly(self, sequence: Callable[..., Outputs]) -> Binder:
        return lambda i: partial(sequence, *self._arguments(i))

    def make(self, device: torch.device, seed: int = 0) -> Operands:
        if self.case.form in PARTIAL_BLOCKS and self._body is None:
            self._body = make_mlp(self.case, device)
        return make_operands(self.case, device, seed, self._body)

    def compiled(self, backend: str = "inductor", mode: str | None = None) -> Binder:
        """A graph of this case alone; for partial blocks one for any K, which changes from layer to layer."""
        if self.case.form in PARTIAL_BLOCKS:
            return partial(_dynamic_in_tokens, _compiled_block(backend), self._arguments)
        options = {"mode": mode} if backend == "inductor" else {"backend": backend}
        return self._eagerly(torch.compile(self._naive, fullgraph=True, dynamic=False, **options))

    def written(self, i: Operands) -> Outputs:
        return (i.slot,) if self.case.form in WRITING else ()

    def exact(self, i: Operands) -> Outputs:
        """The naive sequence in float64."""
        wide = (i if self._whole else i.at(self._tokens(i))).double()
        return (*self._naive(*self._arguments(wide)), *self.written(wide))

    def seen(self, i: Operands, result) -> Outputs:
        found = (*(tensor for tensor in result if tensor is not None), *self.written(i))
        return found if self._whole else tuple(tensor[:, self._tokens(i)] for tensor in found)

    @property
    def _whole(self) -> bool:
        return self.case.form in REFRESHING

    def _tokens(self, i: Operands) -> Tensor:
        most = min(self.case.size.tokens, max(2, ROWS // self.case.size.batch))
        return torch.linspace(0, self.case.size.tokens - 1, most, device=i.x.device).round().long()


@lru_cache(maxsize=4)
def _compiled_block(backend: str) -> Callable[..., Outputs]:
    torch.compiler.reset()
    return torch.compile(host(Form.BLOCK)[1], fullgraph=True, backend=backend)


def _dynamic_in_tokens(compiled: Callable, arguments: Callable[[Operands], tuple], i: Operands) -> Call:
    for tensor in (i.x, *i.features, i.slot, i.fresh, i.fresh_index, i.row_index):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    return partial(compiled, *arguments(i))


def within_eager(bind: Binder, operands) -> Call:
    call = bind(operands)

    def eager() -> object:
        with use_backend("eager"):
            return call()

    return eager


def allowed_error(case: Case) -> float:
    """Relative RMS of as many roundings as the naive sequence makes: two a term, adding up as a random walk.

    An MLP sums too.
    """
    unit = torch.finfo(case.dtype).eps / 2
    rounded = 32 if case.form in PARTIAL_BLOCKS else 4 + 2 * case.terms**0.5
    return unit * rounded


def relative_rms(found: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the exact values."""
    if found.shape != exact.shape:
        return float("inf")
    scale = exact.double().square().mean().sqrt().clamp(min=1e-300)
    return float((found.double() - exact.double()).square().mean().sqrt() / scale)
