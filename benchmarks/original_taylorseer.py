"""TaylorSeer as its original implements it: differences that every full step updates, and a forecast one term at a time.

Written from spec section 6 (Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models
with TaylorSeers"). A forecast of order 4 takes 17 operators a module, and the block's modulation is computed in full.
"""

import math
from collections.abc import Collection

from torch import Tensor

from benchmarks.original import Original
from fastcache.models import DiT
from fastcache.models.dit import Block, modulate


class OriginalTaylorSeer(Original):
    """The blocks of a DiT compute on full steps and forecast on others. full_steps: execution indices."""

    def __init__(self, model: DiT, full_steps: Collection[int], max_order: int) -> None:
        super().__init__(model)
        self._full_steps, self._max_order = frozenset(full_steps), max_order
        self._differences: dict[tuple[int, str], list[Tensor]] = {}
        self._updated: dict[tuple[int, str], int] = {}

    def block(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        attention, mlp = (number, "attn"), (number, "mlp")
        computes = self.step in self._full_steps
        if computes:
            feature = block.attn(modulate(block.norm1(x), shift1, scale1))
            self._update(attention, feature)
        x = x + gate1[:, None] * (feature if computes else self._forecast(attention))
        if computes:
            feature = block.mlp(modulate(block.norm2(x), shift2, scale2))
            self._update(mlp, feature)
        return x + gate2[:, None] * (feature if computes else self._forecast(mlp))

    def clear(self) -> None:
        self._differences.clear()
        self._updated.clear()

    def _update(self, module: tuple[int, str], feature: Tensor) -> None:
        """D_0 = F and D_{m+1} = (D_m - D_m of the full step before) / gap, as far as there is an older one."""
        older = self._differences.get(module, []) if self.step else []
        found = [feature]
        for difference in older[: self._max_order]:
            found.append((found[-1] - difference) / (self.step - self._updated[module]))
        self._differences[module], self._updated[module] = found, self.step

    def _forecast(self, module: tuple[int, str]) -> Tensor:
        """sum_m D_m distance^m / m!"""
        distance, total = self.step - self._updated[module], 0
        for order, difference in enumerate(self._differences[module]):
            total = total + (1 / math.factorial(order)) * difference * distance**order
        return total
