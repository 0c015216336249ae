"""What the originals of the caching methods share: they replace the forward of every block, and keep what they store in dictionaries.

None of their code was read: each is written from the equations and operator sequences of the specification.
"""

import abc
from types import MethodType, TracebackType

from torch import Tensor

from fastcache.models import DiT
from fastcache.models.dit import Block


class Original(abc.ABC):
    """Context manager that runs the blocks of a DiT as a caching method's original does. Set `step` before each model call."""

    def __init__(self, model: DiT) -> None:
        self.step = 0
        self._blocks = list(model.blocks)

    def __enter__(self) -> "Original":
        for number, block in enumerate(self._blocks):
            block.forward = MethodType(self._forward(number), block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            del block.forward
        self.clear()

    def _forward(self, number: int):
        return lambda block, x, c: self.block(number, block, x, c)

    @abc.abstractmethod
    def block(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        """The output of one block, x [B, N, D], c [B, D]."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Forget everything that was stored."""
