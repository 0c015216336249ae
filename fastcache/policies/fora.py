"""FORA: recompute every `interval` steps, reuse in between (docs/methods/fora.md)."""

from dataclasses import dataclass

from fastcache.plan.actions import REUSE
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import full_step, uniform_step
from fastcache.policies.base import Policy, positive_steps
from fastcache.policies.reference import block_overhead_flops, full_block_flops


@dataclass(frozen=True)
class FORA(Policy):
    """Static reuse of attention and MLP outputs, before the gate; gates are always current.

    interval: N of the paper. With the respaced index i = T-1 ... 0, a step is full if it is the
    first or if i is a multiple of N, so the last step is always full.
    Source: Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration".
    """

    interval: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(
                f"interval: expected a whole number >= 1 (1 recomputes every step), got {self.interval!r}"
            )

    def full_steps(self, num_steps: int) -> list[int]:
        """Execution indices of the full steps."""
        num_steps = positive_steps(num_steps)
        last = num_steps - 1
        return [k for k in range(num_steps) if k == 0 or (last - k) % self.interval == 0]

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        num_steps = positive_steps(num_steps)
        full = set(self.full_steps(num_steps))
        computed, reused = full_step(layout), uniform_step(layout, REUSE)
        steps = tuple(computed if k in full else reused for k in range(num_steps))
        return Schedule(layout, steps, "FORA", self.fields())

    def reference_flops(self, num_steps: int, layout: Layout, batch: int) -> int:
        """Full blocks on full steps; LayerNorm and adaLN on the others."""
        full = len(self.full_steps(num_steps))
        reused = num_steps - full
        return layout.depth * (
            full * full_block_flops(layout, batch) + reused * block_overhead_flops(layout, batch)
        )
