"""SmoothCache: a calibrated schedule per branch name, or per branch (docs/methods/smoothcache.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.errors import ScheduleError
from fastcache.plan.layout import Layout
from fastcache.plan.published import PublishedSchedule, steps_from_rows
from fastcache.plan.schedule import Schedule
from fastcache.policies.base import Policy, positive_steps


@dataclass(frozen=True, init=False)
class SmoothCache(Policy):
    """Follows a schedule in the published form: {"attn": [1, 0, ...], "mlp-3": [...]}, 1 = compute.

    Unlike the original, a reused branch costs no norm, modulation or gate work beyond its term.
    Source: Liu et al., "SmoothCache: A Universal Inference Acceleration Technique for Diffusion
    Transformers".
    """

    published: PublishedSchedule

    def __init__(self, schedule: Mapping[str, Any] | str | Path | PublishedSchedule) -> None:
        """schedule: a mapping, JSON text, or the path of a JSON file. Raises ScheduleError naming the entry
        that is wrong.
        """
        object.__setattr__(self, "published", PublishedSchedule.read(schedule))

    @classmethod
    def load(cls, path: str | Path, *, scheduler: str | None = None) -> "SmoothCache":
        """Read a file. One that `calibrate` wrote knows its scheduler: naming yours here checks it.

        Host family, layers, branches and steps of its fingerprint are checked by `schedule`.
        """
        policy = cls(Path(path))
        made = policy.published.fingerprint
        if scheduler is not None and made is not None and made.scheduler not in (None, scheduler):
            raise ScheduleError(
                f"scheduler: {path} was calibrated with {made.scheduler}, got {scheduler!r}; calibrate again"
                " with it"
            )
        return policy

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        rows = self.published.rows(layout, positive_steps(num_steps))
        return Schedule(layout, steps_from_rows(layout, rows), "SmoothCache", self.fields())

    def fields(self) -> dict[str, Any]:
        return {"schedule": self.published.describe()}
