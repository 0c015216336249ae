"""FORA as its original implements it: a dictionary of features, and every block's full modulation at every step.

Written from the equations (spec section 1; Selvaraju et al., "FORA: Fast-Forward Caching in
Diffusion Transformer Acceleration"), in the op sequence of the host's own block.
"""
from collections.abc import Collection
from types import MethodType, TracebackType

from torch import Tensor

from fastcache.models import DiT
from fastcache.models.dit import Block, modulate


class OriginalFORA:
    """Context manager: the blocks of a DiT compute and store on full steps, and reuse on others.

    full_steps: execution indices of the steps that compute. Set `step` before each model call.
    """

    def __init__(self, model: DiT, full_steps: Collection[int]) -> None:
        self.step = 0
        self._blocks, self._full_steps = list(model.blocks), frozenset(full_steps)
        self._cache: dict[tuple[int, str], Tensor] = {}

    def __enter__(self) -> "OriginalFORA":
        for index, block in enumerate(self._blocks):
            block.forward = MethodType(self._forward(index), block)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for block in self._blocks:
            del block.forward
        self._cache.clear()

    def _forward(self, index: int):
        cache = self._cache

        def forward(block: Block, x: Tensor, c: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
            computes = self.step in self._full_steps
            if computes:
                cache[index, "attn"] = block.attn(modulate(block.norm1(x), shift1, scale1))
            x = x + gate1[:, None] * cache[index, "attn"]
            if computes:
                cache[index, "mlp"] = block.mlp(modulate(block.norm2(x), shift2, scale2))
            return x + gate2[:, None] * cache[index, "mlp"]

        return forward
