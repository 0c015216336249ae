"""TaylorSeer: forecast features between full steps from those of the last ones.

Method: docs/methods/taylorseer.md.
"""

from dataclasses import dataclass

from fastcache.plan.actions import REUSE, forecast
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan, full_step, uniform_step
from fastcache.policies.base import Policy, positive_steps
from fastcache.policies.reference import block_overhead_flops, full_block_flops


@dataclass(frozen=True)
class TaylorSeer(Policy):
    """The first steps in full, then one of every `interval`; forecasts in between.

    interval: steps from one full step to the next. max_order: highest power of the Taylor series;
    0 is plain reuse. One order more is available after each full step, and a branch keeps
    max_order + 1 features. first_enhance: full steps at the start.
    Source: Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers".
    """

    interval: int = 4
    max_order: int = 4
    first_enhance: int = 2

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("max_order", 0), ("first_enhance", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")

    def full_steps(self, num_steps: int) -> list[int]:
        """Execution indices of the full steps."""
        last = self.first_enhance - 1
        return [k for k in range(positive_steps(num_steps)) if k <= last or (k - last) % self.interval == 0]

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        num_steps = positive_steps(num_steps)
        full = set(self.full_steps(num_steps))
        computed = full_step(layout)
        forecasts: dict[int, StepPlan] = {}  # by order
        steps: list[StepPlan] = []
        seen = 0
        for k in range(num_steps):
            order = min(self.max_order, seen - 1)
            seen += k in full
            if k not in full and order not in forecasts:
                forecasts[order] = uniform_step(layout, forecast(order) if order else REUSE)
            steps.append(computed if k in full else forecasts[order])
        return Schedule(layout, tuple(steps), "TaylorSeer", self.fields())

    def reference_flops(self, num_steps: int, layout: Layout, batch: int) -> int:
        """Full blocks on full steps; LayerNorm and adaLN on the others."""
        full = len(self.full_steps(num_steps))
        forecasts = num_steps - full
        return layout.depth * (
            full * full_block_flops(layout, batch) + forecasts * block_overhead_flops(layout, batch)
        )
