"""A calibration: measured errors, the threshold that was chosen, and the schedule that follows."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastcache.calibration.drawing import draw_calibration
from fastcache.calibration.scan import ErrorCurves
from fastcache.plan.published import Fingerprint, PublishedSchedule
from fastcache.plan.schedule import Schedule
from fastcache.policies import SmoothCache
from fastcache.version import __version__


@dataclass(frozen=True)
class Calibration:
    """Error curves and the threshold that was chosen. `scheduler` is the sampler's name, kept for
    checking.
    """

    curves: ErrorCurves
    threshold: float
    per_layer: bool = False
    scheduler: str | None = None

    @cached_property
    def published(self) -> PublishedSchedule:
        """The schedule in SmoothCache's form, with a fingerprint of what it was made for."""

        layout = self.curves.layout
        made = Fingerprint(
            layout.family,
            layout.depth,
            layout.names,
            self.curves.num_steps,
            self.scheduler,
            self.threshold,
            self.curves.lookahead,
            __version__,
        )
        return PublishedSchedule(self.curves.published(self.threshold, self.per_layer).entries, made)

    def policy(self) -> SmoothCache:
        """What accelerate takes."""
        return SmoothCache(self.published)

    def schedule(self) -> Schedule:
        """The plan for the calibrated host."""
        return self.policy().schedule(self.curves.num_steps, self.curves.layout)

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON, for `SmoothCache.load` and for SmoothCache itself."""
        self.published.save(path)

    def draw(self, path: str | Path) -> None:
        """Write a picture of errors, threshold and schedule. Needs matplotlib (extra `demo`)."""
        title = f"{self.curves.samples} run(s), ideal speedup {self.schedule().ideal_speedup():.2f}x"
        draw_calibration(self.curves, self.threshold, self.published, title, path, per_layer=self.per_layer)
