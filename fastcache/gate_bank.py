"""All gates of a step in one matrix multiply, for steps whose modulations nobody announced.

A reuse step needs the gates of every block and nothing else of their modulations. Their rows of the
hosts' projections are copied into one matrix, once: the step then launches one product instead of
one per gate, which at small batches costs more than the trunk. The copies are made again whenever a
host's weight is another tensor or was written (LoRA merges, loading, offloading, `.to()`).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.hosts import GateProjection, Host

MOST_BYTES = 512 << 20  # of copied weights; beyond, gates are computed block by block


@dataclass(frozen=True)
class _Copies:
    weight: Tensor  # [L * G * D, C]
    bias: Tensor | None
    state: tuple


class GateBank:
    """Gates [L * G, B, D] of all blocks from a condition [B, C]; row G * block + g."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._copies: _Copies | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of copied weights."""
        if self._copies is None:
            return 0
        return sum(t.numel() * t.element_size() for t in (self._copies.weight, self._copies.bias) if t is not None)

    def gates(self, condition: Tensor) -> Tensor | None:
        """None where the host's projections are not plain, or there would be nothing to save."""
        if condition.ndim != 2 or torch.is_autocast_enabled(condition.device.type):
            return None
        projections = [self._host.gate_projection(block) for block in self._host.blocks]
        if len(projections) < 2 or any(projection is None for projection in projections):
            return None
        state = _state(projections)
        if state is None:
            return None
        if self._copies is None or self._copies.state != state:
            self._copies = None  # freed before its successor is made
            if sum(p.weight.numel() * p.weight.element_size() * p.share for p in projections) > MOST_BYTES:
                return None
            self._copies = _copied(projections, state)
        projection = projections[0]
        made = F.linear(projection.activation(condition), self._copies.weight, self._copies.bias)
        return made.unflatten(-1, (-1, projection.width)).transpose(0, 1)


def _copied(projections: list[GateProjection], state: tuple) -> _Copies:
    with torch.no_grad():
        weight = torch.cat([p.weight[rows] for p in projections for rows in p.rows])
        biased = projections[0].bias is not None
        bias = torch.cat([p.bias[rows] for p in projections for rows in p.rows]) if biased else None
    return _Copies(weight, bias, state)


def _state(projections: list[GateProjection]) -> tuple | None:
    """What changes if any weight is replaced or written; None where that cannot be told."""
    first = projections[0]
    tensors = [t for p in projections for t in (p.weight, p.bias) if t is not None]
    if any(t.is_inference() for t in tensors) or any((p.bias is None) != (first.bias is None) or p.weight.dtype != first.weight.dtype or p.weight.device != first.weight.device for p in projections):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)
