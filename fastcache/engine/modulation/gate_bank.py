"""All gates of a step in one matrix multiply, for steps whose modulations nobody announced.

A reuse step needs the gates of every block and nothing else of their modulations. Their rows of the
host's projections are copied into one matrix at the first cached step of every generation (no counter
of writes is trusted across generations): a step then launches one product instead of one per gate,
which at small batches costs more than the trunk. Within a generation the copies are made again where
a weight is another tensor or its counter moved (LoRA merges, loading, offloading, `.to()`).
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.hosts import GateProjection, Host
from fastcache.hosts.base import HOOKS

MOST_BYTES = 512 << 20  # of copied weights; beyond, gates are computed block by block


@dataclass(frozen=True)
class _Copies:
    weight: Tensor  # [L * G * D, C]
    bias: Tensor | None
    state: tuple[Any, ...]
    norms: Tensor  # of the weights that were copied from, as they were


class GateBank:
    """Gates [L * G, B, D] of all blocks from a condition [B, C], row G * block + g; other vectors block by
    block.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._copies: _Copies | None = None
        self._projections: list[GateProjection | None] | None = None
        self._activated: tuple[Tensor | None, Tensor | None] = (None, None)
        self._fresh = False  # the copies are of this generation
        self._modules: list[nn.Module] = []
        self._hooks: list[dict[str, Any]] = []  # of all modulations: empty while they are plain

    @property
    def nbytes(self) -> int:
        """Bytes of copied weights."""
        if self._copies is None:
            return 0
        return sum(
            t.numel() * t.element_size() for t in (self._copies.weight, self._copies.bias) if t is not None
        )

    @property
    def vectors_held(self) -> tuple[int, ...]:
        """Numbers of the vectors that `gates` returns of each block, in order."""
        return self._projections[0].gates

    def begin_generation(self) -> None:
        """Copies are made anew: modules may have been replaced, and weights written past their counters."""
        self._projections, self._fresh = None, False

    def begin_step(self) -> None:
        """Another condition may stand in the same tensor."""
        self._activated = (None, None)

    def drift(self) -> Tensor | None:
        """How far the weights are from those copied, where no counter has moved; None if that is not known.

        Equal weights have equal norms to the bit, so anything above zero is a write.
        """
        copies = self._copies
        plain = [projection for projection in self._projections or () if projection is not None]
        if copies is None or not self._fresh or len(plain) != len(self._projections or ()):
            return None
        return torch.dist(_norms(plain), copies.norms) if plain and _state(plain) == copies.state else None

    def clear(self) -> None:
        """Free the copies."""
        self._projections, self._copies, self._fresh = None, None, False
        self._modules, self._hooks = [], []
        self._activated = (None, None)

    def gates(self, condition: Tensor) -> Tensor | None:
        """None where the host's projections are not plain, or there would be nothing to save."""
        if condition.ndim != 2 or torch.is_autocast_enabled(condition.device.type):
            return None
        modules = self._host.modulators()
        if self._projections is None or any(self._hooks) or any(map(operator.is_not, modules, self._modules)):
            self._projections = [self._host.gate_projection(block) for block in self._host.blocks]
            self._modules = modules
            self._hooks = [
                part.__dict__[name] for module in modules for part in module.modules() for name in HOOKS
            ]
        projections = self._projections
        if len(projections) < 2 or any(projection is None for projection in projections):
            return None
        state = _state(projections)
        if state is None:
            return None
        if self._copies is None or not self._fresh or self._copies.state != state:
            self._copies = None  # freed before its successor is made
            if (
                sum(
                    len(p.gates) * p.width * p.linear.in_features * p.linear.weight.element_size()
                    for p in projections
                )
                > MOST_BYTES
            ):
                return None
            self._copies, self._fresh = _copied(projections, state), True
        made = F.linear(self._activation(projections[0], condition), self._copies.weight, self._copies.bias)
        return made.unflatten(-1, (-1, projections[0].width)).transpose(0, 1)

    def vectors(self, number: int, first: int, last: int, condition: Tensor) -> Tensor:
        """[B, last - first, D]: vectors first .. last - 1 of one block, from its own weights; only after
        `gates` gave some.
        """
        projection = self._projections[number]
        return F.linear(self._activation(projection, condition), *projection.rows(first, last)).unflatten(
            -1, (last - first, -1)
        )

    def _activation(self, projection: GateProjection, condition: Tensor) -> Tensor:
        known, activated = self._activated
        if known is not condition:
            activated = projection.activation(condition)
            self._activated = condition, activated
        return activated


def _copied(projections: list[GateProjection], state: tuple[Any, ...]) -> _Copies:
    with torch.no_grad():
        rows = [p.rows(gate, gate + 1) for p in projections for gate in p.gates]
        weight = torch.cat([weight for weight, _ in rows])
        bias = None if rows[0][1] is None else torch.cat([bias for _, bias in rows])
        return _Copies(weight, bias, state, _norms(projections))


def _norms(projections: list[GateProjection]) -> Tensor:
    """[L] norms of the weights, on their device."""
    weights = [p.linear.weight.detach() for p in projections]
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(weights, 2, dtype=dtype))


def _state(projections: list[GateProjection]) -> tuple[Any, ...] | None:
    """What changes if any weight is replaced or written; None where that cannot be told."""
    weights, biases = [p.linear.weight for p in projections], [p.linear.bias for p in projections]
    tensors = weights + [bias for bias in biases if bias is not None]
    alike = all(w.dtype == weights[0].dtype and w.device == weights[0].device for w in weights) and len(
        tensors
    ) in (len(weights), 2 * len(weights))
    if not alike or any(t.is_inference() for t in tensors):
        return None
    return tuple((t.data_ptr(), t._version) for t in tensors)
