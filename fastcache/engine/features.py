"""Stored features: a short history per branch, in buffers of ours at fixed addresses.

Nothing of the host's is kept by reference, so nothing that a host writes can reach a stored feature,
and bodies may return the same memory at each call. The newest feature takes the buffer of the oldest.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

TRUNK = -1  # key of the trunk's output, kept for skipped steps


@dataclass(slots=True)
class Slot:
    """A stored feature [B, N, D]. `step` is the step that computed it."""

    tensor: Tensor
    step: int


class FeatureStore:
    """The last `depth` features of every branch, newest first (one store per call of a step).

    dtype: of the buffers, None = that of the feature.
    """

    def __init__(self, depth: int = 1, dtype: torch.dtype | None = None) -> None:
        self._depth, self._dtype = depth, dtype
        self._slots: dict[int, deque[Slot]] = {}

    def __contains__(self, branch: int) -> bool:
        return branch in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def buffer(self, branch: int, like: Tensor, step: int) -> Tensor:
        """A buffer that becomes the newest feature of `branch`; the caller writes all of it.

        The oldest feature's buffer is taken where the history is full and the shape is that of `like`.
        Features of another shape, dtype or device, and those of `step` or later ones (a sampler went
        back), are forgotten.
        """
        history = self._slots.setdefault(branch, deque())
        dtype = self._dtype or like.dtype
        if history and not _alike(history[0].tensor, like, dtype):
            history.clear()
        freed = None
        while history and (history[0].step >= step or len(history) == self._depth):
            slot = history.popleft() if history[0].step >= step else history.pop()
            freed = slot.tensor
        if freed is None:
            with torch.inference_mode(False):  # so that it can be written in any mode
                freed = torch.empty(like.shape, dtype=dtype, device=like.device)
        history.appendleft(Slot(freed, step))
        return freed

    def keep(self, branch: int, feature: Tensor, step: int) -> None:
        """Copy a feature into a buffer, as the newest of `branch`."""
        self.buffer(branch, feature, step).copy_(feature)

    def has(self, branch: int, before: int | None = None) -> bool:
        """True if a feature is stored; before: and the newest was computed at an earlier step than this."""
        history = self._slots.get(branch)
        return history is not None and len(history) > 0 and (before is None or history[0].step < before)

    def feature(self, branch: int, back: int = 0, device: torch.device | None = None) -> Tensor:
        """A stored feature, 0 = the newest; moved to `device` if the model's block has moved there."""
        slot = self._slots[branch][back]
        if device is not None and slot.tensor.device != device:
            slot.tensor = slot.tensor.to(device)
        return slot.tensor

    def steps(self, branch: int) -> list[int]:
        """The steps that computed the stored features of `branch`, newest first."""
        return [slot.step for slot in self._slots.get(branch, ())]

    def history(self, branch: int) -> list[Tensor]:
        """The stored features of `branch`, newest first."""
        return [slot.tensor for slot in self._slots.get(branch, ())]

    def age(self, branch: int, step: int) -> int:
        """Steps since the newest feature of `branch` was computed."""
        return step - self._slots[branch][0].step

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(
            slot.tensor.numel() * slot.tensor.element_size()
            for history in self._slots.values()
            for slot in history
        )

    def clear(self) -> None:
        """Forget and free every feature."""
        self._slots.clear()


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and a.dtype == dtype and a.device == b.device
