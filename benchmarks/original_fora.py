"""FORA as its original implements it: a dictionary of features, and every block's full modulation at every step.

Written from the equations (spec section 1; Selvaraju et al., "FORA: Fast-Forward Caching in
Diffusion Transformer Acceleration"), in the op sequence of the host's own block.
"""

from collections.abc import Collection

from torch import Tensor

from benchmarks.original import Original
from fastcache.models import DiT
from fastcache.models.dit import Block, modulate


class OriginalFORA(Original):
    """The blocks of a DiT compute and store on full steps, and reuse on others. full_steps: execution indices."""

    def __init__(self, model: DiT, full_steps: Collection[int]) -> None:
        super().__init__(model)
        self._full_steps = frozenset(full_steps)
        self._cache: dict[tuple[int, str], Tensor] = {}

    def block(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        cache = self._cache
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        computes = self.step in self._full_steps
        if computes:
            cache[number, "attn"] = block.attn(modulate(block.norm1(x), shift1, scale1))
        x = x + gate1[:, None] * cache[number, "attn"]
        if computes:
            cache[number, "mlp"] = block.mlp(modulate(block.norm2(x), shift2, scale2))
        return x + gate2[:, None] * cache[number, "mlp"]

    def clear(self) -> None:
        self._cache.clear()
