"""What a host does without FastCache: its own op sequence, and the fewest launches that eager PyTorch needs.

`naive_*` are the sequences of the models and caching methods themselves, in the dtype of x;
torch.compile gets these. `best_*` use the fused calls of PyTorch that a careful host could.
Shapes: x, features, slot [B, N, D]; gate, shift, scale [B, D]; indices [B, K]. What is computed is in
`cases.MEANINGS`. All return new tensors and leave their arguments alone, a `slot` excepted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Form
from benchmarks.inputs import Inputs

Outputs = tuple[Tensor, ...]


def naive_trunk(x: Tensor, features: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    for feature, gate in zip(features, gates):
        x = x + gate[:, None] * feature
    return (x,)


def best_trunk(x: Tensor, features: Sequence[Tensor], gates: Sequence[Tensor]) -> Outputs:
    total = torch.addcmul(x, gates[0][:, None], features[0])
    for feature, gate in zip(features[1:], gates[1:]):
        total.addcmul_(gate[:, None], feature)
    return (total,)


def naive_update(x: Tensor, feature: Tensor, gate: Tensor) -> Outputs:
    return (x + gate[:, None] * feature,)


def best_update(x: Tensor, feature: Tensor, gate: Tensor) -> Outputs:
    return (torch.addcmul(x, gate[:, None], feature),)


def naive_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None],)


def best_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """With one sample, shift and scale are the LayerNorm's own affine part; else it takes a second launch."""
    if len(x) == 1:
        return (F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps=1e-6),)
    return (torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None]),)


def naive_update_modulate(x: Tensor, feature: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    (x,) = naive_update(x, feature, gate)
    return (x, *naive_modulate(x, shift, scale))


def best_update_modulate(x: Tensor, feature: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    (x,) = best_update(x, feature, gate)
    return (x, *best_modulate(x, shift, scale))


def naive_modulate_rms(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    return (F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None],)


def best_modulate_rms(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """As `best_modulate`; RMSNorm has a weight and no bias, so it is always two launches."""
    return (torch.addcmul(shift[:, None], F.rms_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None]),)


def naive_update_modulate_rms(
    x: Tensor, feature: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> Outputs:
    (x,) = naive_update(x, feature, gate)
    return (x, *naive_modulate_rms(x, shift, scale))


def best_update_modulate_rms(
    x: Tensor, feature: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> Outputs:
    (x,) = best_update(x, feature, gate)
    return (x, *best_modulate_rms(x, shift, scale))


def naive_store(x: Tensor, slot: Tensor, fresh: Tensor, gate: Tensor) -> Outputs:
    slot.copy_(fresh)
    return naive_update(x, fresh, gate)


def best_store(x: Tensor, slot: Tensor, fresh: Tensor, gate: Tensor) -> Outputs:
    slot.copy_(fresh)
    return best_update(x, fresh, gate)


def naive_refresh(
    x: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_index: Tensor,
    row_index: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> Outputs:
    slot.scatter_(1, _columns(fresh_index, x), fresh)
    (x,) = naive_update(x, slot, gate)
    return (x, *naive_modulate(x.gather(1, _columns(row_index, x)), shift, scale))


def best_refresh(
    x: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_index: Tensor,
    row_index: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
) -> Outputs:
    slot.scatter_(1, _columns(fresh_index, x), fresh)
    (x,) = best_update(x, slot, gate)
    return (x, *best_modulate(x.gather(1, _columns(row_index, x)), shift, scale))


def naive_forecast(x: Tensor, differences: Sequence[Tensor], gate: Tensor, distance: int) -> Outputs:
    """sum_k D_k distance^k / k!, as TaylorSeer sums it."""
    prediction = 0
    for order, difference in enumerate(differences):
        prediction = prediction + (1 / math.factorial(order)) * difference * distance**order
    return naive_update(x, prediction, gate)


def best_forecast(x: Tensor, differences: Sequence[Tensor], gate: Tensor, distance: int) -> Outputs:
    prediction = torch.add(differences[0], differences[1], alpha=distance)
    for order, difference in enumerate(differences[2:], start=2):
        prediction.add_(difference, alpha=distance**order / math.factorial(order))
    return best_update(x, prediction, gate)


def naive_errors(feature: Tensor, reference: Tensor) -> Outputs:
    sums = [part.abs().sum((1, 2)) for part in (feature - reference, feature, reference)]
    return (torch.stack(sums, dim=1),)


def best_errors(feature: Tensor, reference: Tensor) -> Outputs:
    """One temporary for all; `torch.linalg.vector_norm(..., 1)` moves fewer bytes and is five times slower on a CPU."""
    part = torch.sub(feature, reference)
    sums = [
        part.abs_().sum((1, 2)),
        torch.abs(feature, out=part).sum((1, 2)),
        torch.abs(reference, out=part).sum((1, 2)),
    ]
    return (torch.stack(sums, dim=1),)


def _columns(index: Tensor, x: Tensor) -> Tensor:
    """[B, K] -> [B, K, D], as gather and scatter_ take it."""
    return index[..., None].expand(-1, -1, x.shape[-1])


@dataclass(frozen=True)
class HostSequence:
    """How a host computes a form: `arguments` picks its operands, in order."""

    arguments: Callable[[Inputs], tuple]
    naive: Callable[..., Outputs]
    best: Callable[..., Outputs]


_FORECAST = HostSequence(lambda i: (i.x, i.features, i.gate, i.distance), naive_forecast, best_forecast)
HOST_SEQUENCES = {
    Form.TRUNK: HostSequence(lambda i: (i.x, i.features, i.gates), naive_trunk, best_trunk),
    Form.UPDATE: HostSequence(lambda i: (i.x, i.features[0], i.gate), naive_update, best_update),
    Form.UPDATE_MODULATE: HostSequence(
        lambda i: (i.x, i.features[0], i.gate, i.shift, i.scale), naive_update_modulate, best_update_modulate
    ),
    Form.MODULATE: HostSequence(lambda i: (i.x, i.shift, i.scale), naive_modulate, best_modulate),
    Form.STORE: HostSequence(lambda i: (i.x, i.slot, i.fresh, i.gate), naive_store, best_store),
    Form.REFRESH: HostSequence(
        lambda i: (i.x, i.slot, i.fresh, i.fresh_index, i.row_index, i.gate, i.shift, i.scale),
        naive_refresh,
        best_refresh,
    ),
    Form.FORECAST_2: _FORECAST,
    Form.FORECAST_4: _FORECAST,
    Form.UPDATE_MODULATE_RMS: HostSequence(
        lambda i: (i.x, i.features[0], i.gate, i.shift, i.scale),
        naive_update_modulate_rms,
        best_update_modulate_rms,
    ),
    Form.MODULATE_RMS: HostSequence(lambda i: (i.x, i.shift, i.scale), naive_modulate_rms, best_modulate_rms),
    Form.ERRORS: HostSequence(lambda i: (i.features[0], i.reference), naive_errors, best_errors),
}
