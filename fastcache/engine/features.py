"""Stored features: a short history per branch, borrowed from the host or owned by us."""

from collections import deque
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
    """The last `depth` features of every branch, newest first (one store per call of a step).

    dtype: of the buffers that we own, None = that of the feature.
    """

    def __init__(self, depth: int = 1, dtype: torch.dtype | None = None) -> None:
        self._depth, self._dtype = depth, dtype
        self._slots: dict[int, deque[Slot]] = {}

    def __contains__(self, branch: int) -> bool:
        return branch in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def borrow(self, branch: int, feature: Tensor, step: int) -> Slot:
        """Keep a reference to `feature` as the newest feature of `branch`."""
        return self._push(branch, Slot(feature, False, step, _version(feature)))

    def buffer(self, branch: int, like: Tensor, step: int) -> Slot:
        """An owned buffer that becomes the newest feature of `branch`; the caller writes all of it.

        The oldest feature's buffer is taken where the history is full and the shape is that of `like`.
        """
        history = self._slots.get(branch, ())
        dtype = self._dtype or like.dtype
        if len(history) == self._depth and history[-1].owned and _alike(history[-1].tensor, like, dtype):
            return self._push(branch, Slot(history[-1].tensor, True, step, None))
        return self._push(
            branch,
            Slot(
                torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format), True, step, None
            ),
        )

    def own(self, branch: int) -> Slot:
        """The newest feature of `branch`, in a buffer that may be written.

        A borrowed tensor may be held elsewhere: it is copied, once.
        """
        slot = self._slots[branch][0]
        if not slot.owned:
            kept = self.feature(branch)
            slot = Slot(
                torch.empty_like(kept, memory_format=torch.contiguous_format).copy_(kept),
                True,
                slot.step,
                None,
            )
            self._slots[branch][0] = slot
        return slot

    def usable(self, branch: int, x: Tensor) -> bool:
        """True if a feature is stored, and all that are belong to a stream of x's shape and device."""
        history = self._slots.get(branch)
        return bool(history) and all(
            slot.tensor.shape == x.shape and slot.tensor.device == x.device for slot in history
        )

    def feature(self, branch: int, back: int = 0) -> Tensor:
        """A stored feature, 0 = the newest. Raises SessionError if a borrowed one was written by someone
        else.
        """
        slot = self._slots[branch][back]
        if slot.version is not None and slot.tensor._version != slot.version:
            raise SessionError(
                f"the stored feature of branch {branch} was modified in place after the host's module"
                " returned it; return a copy from that module, or call session.reset() before the next step"
            )
        return slot.tensor

    def steps(self, branch: int) -> list[int]:
        """The steps that computed the stored features of `branch`, newest first."""
        return [slot.step for slot in self._slots.get(branch, ())]

    def history(self, branch: int) -> list[Tensor]:
        """The stored features of `branch`, newest first."""
        return [self.feature(branch, back) for back in range(len(self._slots.get(branch, ())))]

    def age(self, branch: int, step: int) -> int:
        """Steps since the newest feature of `branch` was computed."""
        return step - self._slots[branch][0].step

    @property
    def nbytes(self) -> int:
        """Bytes held, shared storages counted once."""
        tensors = [slot.tensor.untyped_storage() for history in self._slots.values() for slot in history]
        return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())

    def clear(self) -> None:
        """Forget every feature and free what we own."""
        self._slots.clear()

    def _push(self, branch: int, slot: Slot) -> Slot:
        history = self._slots.setdefault(branch, deque())
        if history and not _alike(history[0].tensor, slot.tensor, slot.tensor.dtype):
            history.clear()  # of another batch, resolution or dtype
        history.appendleft(slot)
        while len(history) > self._depth:
            history.pop()
        return slot


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and a.dtype == dtype and a.device == b.device
