"""The residual stream: updates are queued, and one launch applies them all.

stream = ResidualStream(x)
h = stream.modulated(shift, scale)       # LayerNorm + adaLN modulate
stream.add(attention(h), gate)           # queued, not yet run
h = stream.modulated(shift2, scale2)     # one launch: add, norm, modulate
stream.add(mlp(h), gate2)
x = stream.value()                       # one launch: add
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.backends.checks import MAX_TERMS
from fastcache.backends.constants import constant_row
from fastcache.ops import Norm, SlotMap, residual_update, residual_update_scatter_


@dataclass(slots=True)
class FreshRows:
    """Rows [B, K, D] that a slot takes before it is added; slots [B, N] says where, None = all rows.

    stored: a launch has put them there, and the rows themselves may be anything by now; whoever else
    has the term queued (a stream, a Deferred) then reads the slot. version: of the rows when they were
    queued, None where PyTorch keeps none.
    """

    rows: Tensor
    slots: Tensor | None
    version: int | None
    stored: bool = False
    slot_version: int | None = None  # of the slot when it had taken them

    def still_in(self, slot: Tensor) -> bool:
        """True if the slot holds what these rows made of it (a later refresh has not changed it)."""
        return self.stored and (self.slot_version is None or slot._version == self.slot_version)


@dataclass(frozen=True, slots=True)
class Term:
    """One queued update: weight * gate * feature.

    gate is a vector, or packed gates [G, *vector] of which `gate_row` is meant.
    """

    feature: Tensor
    gate: Tensor | None = None
    gate_row: int | None = None
    weight: float | None = None
    fresh: FreshRows | None = None  # that `feature`, an owned slot, takes first

    @property
    def refreshing(self) -> bool:
        """True if the slot has not taken its rows yet."""
        return self.fresh is not None and not self.fresh.stored


class ResidualStream:
    """x [B, N, D] plus a queue of updates. x is never modified; every result is a new tensor.

    x must not be modified from outside while updates are pending: that is an error at the next
    launch (inference tensors excepted, which PyTorch does not track).
    """

    def __init__(self, x: Tensor, pending: tuple[Term, ...] = (), guard: int | None = None) -> None:
        if x.ndim != 3:
            raise ValueError(f"x: expected [B, N, D], got {list(x.shape)}")
        self._x = x
        self._guard = tensor_version(x) if guard is None else guard
        self._pending: list[Term] = list(pending)
        self._refreshing = any(term.refreshing for term in pending)

    @property
    def pending(self) -> tuple[Term, ...]:
        """Updates that are queued and not applied."""
        return tuple(self._pending)

    @property
    def base(self) -> Tensor:
        """The stream without what is pending."""
        return self._x

    @property
    def guard(self) -> int | None:
        """Version of `base` when it was taken, None where PyTorch keeps none."""
        return self._guard

    def add(
        self,
        feature: Tensor,
        gate: Tensor | None = None,
        *,
        gate_row: int | None = None,
        weight: float | None = None,
    ) -> None:
        """Queue x += weight * gate * feature; feature [B, N, D], gate a vector (or packed, with
        `gate_row`).
        """
        self._queue(Term(feature, gate, gate_row, weight))

    def refresh(
        self,
        slot: Tensor,
        fresh: Tensor,
        slots: SlotMap | None = None,
        gate: Tensor | None = None,
        *,
        gate_row: int | None = None,
    ) -> None:
        """Queue: slot [B, N, D] takes the fresh rows [B, K, D] of `slots` (all rows without), then x += gate
        * slot.
        """
        if self._refreshing or any(same_memory(term.feature, slot) for term in self._pending):
            self._flush()  # one refresh a launch, and terms queued before it see the slot as it was
        rows = FreshRows(fresh, None if slots is None else slots.slots, tensor_version(fresh))
        self._queue(Term(slot, gate, gate_row, None, rows))
        self._refreshing = True

    def modulated(
        self,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        rows: SlotMap | None = None,
        norm: Norm = Norm.LAYER,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Apply what is pending and return norm(x) * (1 + scale) + shift in the same launch.

        shift, scale: vectors; weight, bias: [D], the affine part of the norm; rows: only these
        tokens, packed to [B, K, D]. Returns [B, N, D] or [B, K, D] in x's dtype.
        """
        return self._flush(
            norm=norm, shift=shift, scale=scale, norm_weight=weight, norm_bias=bias, eps=eps, rows=rows
        )

    def value(self) -> Tensor:
        """Apply what is pending and return x; with nothing pending, the current x itself."""
        if self._pending:
            self._flush()
        return self._x

    def _queue(self, term: Term) -> None:
        # all features of one launch share a dtype, a launch holds MAX_TERMS of them, and a slot that
        # is refreshed in a launch is none of its other terms
        if self._pending and (
            term.feature.dtype != self._pending[0].feature.dtype
            or len(self._pending) == MAX_TERMS
            or (
                self._refreshing
                and any(
                    queued.refreshing and same_memory(queued.feature, term.feature)
                    for queued in self._pending
                )
            )
        ):
            self._flush()
        self._pending.append(term)

    def _flush(
        self,
        norm: Norm = Norm.NONE,
        shift=None,
        scale=None,
        norm_weight=None,
        norm_bias=None,
        eps: float = 1e-6,
        rows: SlotMap | None = None,
    ) -> Tensor | None:
        if self._guard is not None and self._x._version != self._guard:
            raise RuntimeError(
                "x was modified in place while updates of the residual stream were pending; modify a copy, or"
                " call stream.value() first and open a new stream on what you modify"
            )
        terms = self._pending
        gates, gate_index = packed_gates(terms, self._x)
        position = next((j for j, term in enumerate(terms) if term.refreshing), None)
        options = dict(
            gates=gates,
            gate_index=gate_index,
            weights=weight_row(terms, self._x.device),
            norm=norm,
            shift=shift,
            scale=scale,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            row_slots=None if rows is None else rows.slots,
            row_count=0 if rows is None else rows.count,
            need_x=bool(terms),
        )
        if position is None:
            result = residual_update(self._x, [term.feature for term in terms], **options)
        else:
            features = [term.feature for j, term in enumerate(terms) if j != position]
            slot, fresh = terms[position].feature, terms[position].fresh
            if fresh.version is not None and fresh.rows._version != fresh.version:
                raise RuntimeError(
                    "fresh: rows that a slot was to take were modified in place before the launch that stores"
                    " them; return a copy from the module that computed them"
                )
            result = residual_update_scatter_(
                self._x, slot, fresh.rows, fresh.slots, features, position=position, **options
            )
            fresh.stored, fresh.slot_version = True, tensor_version(slot)
        self._pending, self._refreshing = [], False  # only now: a launch that raised loses nothing
        if terms:
            self._x, self._guard = result.x, tensor_version(result.x)
        return result.h


def tensor_version(tensor: Tensor) -> int | None:
    """In-place modification counter, or None where there is none to read (inference, tracing)."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if two tensors start at the same place (while tracing: if they are one object)."""
    return a is b or (not torch.compiler.is_compiling() and a.numel() > 0 and a.data_ptr() == b.data_ptr())


def packed_gates(terms: list[Term], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gates of all terms in the form of the operator: (gates, gate_index)."""
    gated = [term for term in terms if term.gate is not None]
    if not gated:
        return None, None
    first = gated[0]
    if all(term.gate is first.gate and (term.gate_row is None) == (first.gate_row is None) for term in gated):
        if first.gate_row is not None and (len(terms) > 1):
            return first.gate, constant_row(
                tuple(-1 if term.gate is None else term.gate_row for term in terms), torch.int32, x.device
            )
        gate = first.gate if first.gate_row is None else first.gate[first.gate_row]
        if len(gated) == len(terms):
            return gate, None
        return gate[None], constant_row(
            tuple(-1 if term.gate is None else 0 for term in terms), torch.int32, x.device
        )
    vectors = [
        _vector_3d(term.gate if term.gate_row is None else term.gate[term.gate_row], x) for term in gated
    ]
    frames = math.lcm(*(vector.shape[1] for vector in vectors))  # each divides N, so this does too
    batch = max(vector.shape[0] for vector in vectors)
    packed = torch.stack([_frames(vector, frames).expand(batch, frames, -1) for vector in vectors])
    rows = iter(range(len(gated)))
    return packed, constant_row(
        tuple(-1 if term.gate is None else next(rows) for term in terms), torch.int32, x.device
    )


def weight_row(terms: list[Term], device: torch.device) -> Tensor | None:
    """[J] float32 weights of the terms, or None if every weight is one."""
    if all(term.weight is None for term in terms):
        return None
    return constant_row(
        tuple(1.0 if term.weight is None else float(term.weight) for term in terms), torch.float32, device
    )


def _vector_3d(vector: Tensor, x: Tensor) -> Tensor:
    """[B or 1, F, D] form of a vector."""
    if vector.ndim == 1:
        return vector[None, None]
    return vector[:, None] if vector.ndim == 2 else vector


def _frames(vector: Tensor, frames: int) -> Tensor:
    if vector.shape[1] in (1, frames):
        return vector.expand(-1, frames, -1)
    return vector.repeat_interleave(frames // vector.shape[1], dim=1)
