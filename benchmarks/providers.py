"""Who computes a form: the host's own sequence, eager PyTorch at its best, torch.compile, and FastCache."""

import enum
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.cases import Form
from benchmarks.host_sequences import HOST_SEQUENCES, Outputs
from benchmarks.inputs import Inputs
from fastcache import use_backend
from fastcache.ops import Norm, ResidualUpdate, residual_update, residual_update_scatter_

Call = Callable[[], tuple]
Binder = Callable[[Inputs], Call]


class Provider(str, enum.Enum):
    """Contenders of a case."""

    NAIVE = "naive"
    BEST_EAGER = "best eager"
    COMPILED = "torch.compile"
    OURS = "fastcache"  # on the backend that FastCache chooses
    OURS_EAGER = "fastcache eager"  # its definition, for reference


def binder(provider: Provider, form: Form, inductor: str = "inductor") -> Binder:
    """A function that binds inputs and gives a call without arguments.

    One binder serves all buffers of a case, so that torch.compile compiles once.
    """
    host = HOST_SEQUENCES[form]
    if provider is Provider.NAIVE:
        return lambda inputs: partial(host.naive, *host.arguments(inputs))
    if provider is Provider.BEST_EAGER:
        return lambda inputs: partial(host.best, *host.arguments(inputs))
    if provider is Provider.COMPILED:
        torch.compiler.reset()  # a graph of this case alone: no recompile limit, no dynamic shapes
        compiled = torch.compile(host.naive, fullgraph=True, dynamic=False, backend=inductor)
        return lambda inputs: partial(compiled, *host.arguments(inputs))
    if provider is Provider.OURS:
        return OURS[form]
    return lambda inputs: partial(_eager, OURS[form](inputs))


def outputs(form: Form, inputs: Inputs, result: tuple) -> Outputs:
    """Everything that a call computed: what it returned and, where there is one, the slot that it wrote."""
    returned = tuple(tensor for tensor in result if tensor is not None)
    return (*returned, inputs.slot) if form.writes_slot else returned


def _eager(call: Call) -> tuple:
    with use_backend("eager"):
        return call()


def _trunk(i: Inputs) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, i.features, i.table, gate_index=i.gate_index)


def _update(i: Inputs) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, i.features[0], i.gate)


def _update_modulate(i: Inputs, norm: Norm = Norm.LAYER) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, i.features[0], i.gate, norm=norm, shift=i.shift, scale=i.scale)


def _modulate(i: Inputs, norm: Norm = Norm.LAYER) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, (), norm=norm, shift=i.shift, scale=i.scale, need_x=False)


def _store(i: Inputs) -> Callable[[], ResidualUpdate]:
    return partial(residual_update_scatter_, i.x, i.slot, i.fresh, gates=i.gate)


def _refresh(i: Inputs) -> Callable[[], ResidualUpdate]:
    rows = {"row_slots": i.row_slots, "row_count": i.row_index.shape[1]}
    return partial(
        residual_update_scatter_,
        i.x,
        i.slot,
        i.fresh,
        i.fresh_slots,
        gates=i.gate,
        norm=Norm.LAYER,
        shift=i.shift,
        scale=i.scale,
        **rows,
    )


def _forecast(i: Inputs) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, i.features, i.gate, weights=i.weights)


def _errors(i: Inputs) -> Callable[[], ResidualUpdate]:
    return partial(residual_update, i.x, i.features, reference=i.reference, need_x=False)


OURS: dict[Form, Binder] = {
    Form.TRUNK: _trunk,
    Form.UPDATE: _update,
    Form.UPDATE_MODULATE: _update_modulate,
    Form.MODULATE: _modulate,
    Form.STORE: _store,
    Form.REFRESH: _refresh,
    Form.FORECAST_2: _forecast,
    Form.FORECAST_4: _forecast,
    Form.ERRORS: _errors,
    Form.UPDATE_MODULATE_RMS: partial(_update_modulate, norm=Norm.RMS),
    Form.MODULATE_RMS: partial(_modulate, norm=Norm.RMS),
}
