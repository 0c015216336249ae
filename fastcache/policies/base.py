"""What every policy is: settings in, a plan out."""

import abc
import numbers
from dataclasses import asdict
from typing import Any, SupportsIndex

from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan


class Policy(abc.ABC):
    """A caching method. Subclasses are frozen dataclasses with the field names of the method.

    Static policies implement `schedule`; a policy that looks at the data implements `decide`,
    which is asked at each step what it is to do.
    """

    @abc.abstractmethod
    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        """The whole plan of a generation of `num_steps` model evaluations, before its first step."""

    def candidates(self, num_steps: int, layout: Layout) -> tuple[StepPlan, ...]:
        """What `decide` may return beyond the steps of `schedule`, so that what they need is kept."""
        return ()

    def decide(self, step: int, planned: StepPlan, signals: dict[str, Any]) -> StepPlan:
        """The plan of this step. A static policy does as planned; signals are what was measured."""
        return planned

    def reference_flops(self, num_steps: int, layout: Layout, batch: int) -> int:
        """FLOPs by the original authors' own formula, to check against their published figures."""
        raise NotImplementedError(f"{type(self).__name__} has no published FLOP formula")

    def fields(self) -> dict[str, Any]:
        """The settings by name, for reports and JSON."""
        return asdict(self)  # type: ignore[call-overload]


def positive_steps(num_steps: SupportsIndex) -> int:
    """A number of model evaluations as an int; NumPy's whole numbers are such too. Raises ValueError."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, numbers.Integral) or num_steps < 1:
        raise ValueError(f"num_steps: expected a whole number of model evaluations >= 1, got {num_steps!r}")
    return int(num_steps)
