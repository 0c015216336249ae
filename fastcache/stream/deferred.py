"""A tensor that stands for a residual stream whose updates have not been applied yet."""

import dataclasses

import torch
from torch import Tensor

from fastcache.stream.residual_stream import ResidualStream, Term

_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_quantized",
        "is_sparse",
    )
) | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.stride,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
    Tensor.__len__,
    Tensor.get_device,
    torch.numel,
    torch.is_floating_point,
}


class Deferred(Tensor):
    """What blocks of an accelerated model hand on: x plus queued updates.

    Shape, dtype and device are known; any other use materialises the value once, first. So a host
    that reads, adds to or writes x between blocks is slower, never wrong. In-place writes go to
    the materialised value, which the next block then takes as its input.
    """

    value: Tensor | None

    @staticmethod
    def __new__(cls, stream: ResidualStream) -> "Deferred":
        x = stream.base
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    def __init__(self, stream: ResidualStream) -> None:
        self.value = None
        self._start: Tensor | None = stream.base
        self._guard = stream.guard
        self._terms: tuple[Term, ...] = stream.pending

    def materialised(self) -> Tensor:
        """The value [B, N, D], computed at the first call; it aliases no other tensor."""
        if self.value is None:
            # a slot takes its rows at the first launch, be it this one or the running stream's
            stream = ResidualStream(self._start, _as_queued(self._terms), guard=self._guard)
            self.value = stream.value() if self._terms else self._start.clone()
            self._start, self._terms = None, ()
        return self.value

    def stream(self) -> ResidualStream:
        """A residual stream that continues from here."""
        if self.value is not None:
            return ResidualStream(self.value)
        return ResidualStream(self._start, _as_queued(self._terms), guard=self._guard)

    def __repr__(self) -> str:
        return (
            f"Deferred({list(self.shape)}, {self.dtype},"
            f" {'materialised' if self.value is not None else f'{len(self._terms)} pending'})"
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        subject = args[0] if args else next(iter((kwargs or {}).values()), None)
        if func in _METADATA and isinstance(subject, Deferred) and subject.value is None:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = _with_values((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = _with_values((args, kwargs or {}))
        return func(*args, **kwargs)


def _as_queued(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms as they were queued: a slot that has been refreshed again since is made anew."""
    return tuple(
        dataclasses.replace(
            term, feature=term.feature.clone(), fresh=dataclasses.replace(term.fresh, stored=False)
        )
        if term.fresh is not None and term.fresh.stored and not term.fresh.still_in(term.feature)
        else term
        for term in terms
    )


def _with_values(tree):
    return torch.utils._pytree.tree_map_only(Deferred, Deferred.materialised, tree)
