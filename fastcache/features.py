"""Stored features: one slot per branch, borrowed from the host or owned by us."""
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.errors import SessionError


@dataclass(slots=True)
class Slot:
    """A stored feature [B, N, D]. `step` is the step that computed it.

    Borrowed: a reference to what the host's module returned; free, and never written by us.
    Owned: a buffer of ours, which refreshes, graphs and rings may write.
    """

    tensor: Tensor
    owned: bool
    step: int
    version: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the feature."""
        return self.tensor.numel() * self.tensor.element_size()


class FeatureStore:
    """Slots by branch index of one model evaluation (one store per call of a step)."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}

    def __contains__(self, branch: int) -> bool:
        return branch in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def borrow(self, branch: int, feature: Tensor, step: int) -> Slot:
        """Keep a reference to `feature` as the stored feature of `branch`."""
        slot = Slot(feature, False, step, _version(feature))
        self._slots[branch] = slot
        return slot

    def own(self, branch: int, like: Tensor, step: int) -> Slot:
        """An owned buffer for `branch`, shaped as `like`; its content is kept if it was borrowed.

        The first partial step after a full one calls this: a borrowed tensor may be held
        elsewhere and must not be written.
        """
        slot = self._slots.get(branch)
        if slot is not None and slot.owned and _alike(slot.tensor, like):
            slot.step = step
            return slot
        buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
        if slot is not None and _alike(slot.tensor, like):
            buffer.copy_(self.feature(branch))
        self._slots[branch] = Slot(buffer, True, step, None)
        return self._slots[branch]

    def usable(self, branch: int, x: Tensor) -> bool:
        """True if a feature is stored that belongs to a stream of x's shape and device."""
        slot = self._slots.get(branch)
        return slot is not None and slot.tensor.shape == x.shape and slot.tensor.device == x.device

    def feature(self, branch: int) -> Tensor:
        """The stored feature. Raises SessionError if a borrowed one was written by someone else."""
        slot = self._slots[branch]
        if slot.version is not None and slot.tensor._version != slot.version:
            raise SessionError(f"the stored feature of branch {branch} was modified in place after the host's module returned it; return a copy from that module, or call session.reset() before the next step")
        return slot.tensor

    def age(self, branch: int, step: int) -> int:
        """Steps since the feature of `branch` was computed."""
        return step - self._slots[branch].step

    @property
    def nbytes(self) -> int:
        """Bytes held, shared storages counted once."""
        storages = {slot.tensor.untyped_storage().data_ptr(): slot.tensor.untyped_storage().nbytes() for slot in self._slots.values()}
        return sum(storages.values())

    def clear(self) -> None:
        """Forget every feature and free what we own."""
        self._slots.clear()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
