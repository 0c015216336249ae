"""What a frontier is going to measure: policies, plans, what is there already, and how long the rest
takes.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastcache.calibration.scan import ErrorCurves
from fastcache.files.digest import digest_of_file
from fastcache.files.whole import remove_leftovers, require_writable_folder
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.plan.schedule import Schedule
from fastcache.policies import Policy
from fastcache.workshop.environment import environment
from fastcache.workshop.glyphs import load_glyph_dit, weights_path
from fastcache.workshop.studies.comparison import Sampler
from fastcache.workshop.studies.frontier.calibrating import calibrated, error_curves
from fastcache.workshop.studies.frontier.grid import (
    DEFAULT_GRID,
    TINY_GRID,
    Calibrated,
    FrontierSetting,
    chosen,
)
from fastcache.workshop.studies.frontier.results import Store, fingerprint_of

TRIAL_STEPS = 4


@dataclass(frozen=True)
class FrontierOptions:
    """pictures: of each setting. comparisons: batches of a setting that an uncached one precedes."""

    grid: tuple[FrontierSetting, ...] = DEFAULT_GRID
    sampler: Sampler = Sampler(batch_size=12)
    pictures: int = 1008
    comparisons: int = 3

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise ValueError(
                f"pictures: expected at least 2 (a Frechet distance compares sets), got {self.pictures}"
            )
        if self.comparisons < 1:
            raise ValueError(f"comparisons: expected at least 1, got {self.comparisons}")


TINY = FrontierOptions(grid=TINY_GRID, sampler=Sampler(steps=5, batch_size=4), pictures=8, comparisons=2)


@dataclass(frozen=True)
class Planned:
    """One setting with its policy and plan. seconds: the estimate of sampling it, none if it is there."""

    setting: FrontierSetting
    policy: Policy | None
    schedule: Schedule | None
    fields: dict[str, object]
    fingerprint: str
    state: str  # there, stale or new
    seconds: float

    @property
    def ideal_speedup(self) -> float:
        """Uncached FLOPs / planned FLOPs."""
        return 1.0 if self.schedule is None else self.schedule.ideal_speedup()


@dataclass(frozen=True)
class FrontierPlan:
    """A frontier before it is measured. `grid` is the whole of it; of `measured` those are done that are not
    there.
    """

    model: DiT
    options: FrontierOptions
    store: Store
    grid: tuple[Planned, ...]
    measured: tuple[Planned, ...]  # chosen by `only`
    uncached_seconds_per_picture: float  # of a short trial

    @property
    def left(self) -> list[Planned]:
        """What is to be measured still."""
        return [planned for planned in self.measured if planned.state != "there"]

    @property
    def seconds(self) -> float:
        """The estimate for all that is left."""
        return sum(planned.seconds for planned in self.measured)


def plan_frontier(
    out: Path, options: FrontierOptions = FrontierOptions(), *, only: Sequence[str] = ()
) -> FrontierPlan:
    """Calibrates if a SmoothCache setting needs it, times a short trial, and looks at what is in `out`.

    Raises ValueError for a pattern in `only` that fits no setting; ScheduleError if a target speedup is out
    of reach.
    """
    wanted = chosen(options.grid, only)
    require_writable_folder(out / "results")
    for folder in (out, out / "results"):
        remove_leftovers(folder)
    model, sampler, store = load_glyph_dit(), options.sampler, Store(out / "results")
    base: dict[str, object] = {
        "environment": asdict(environment()),
        "sampler": asdict(sampler),
        "weights": [
            digest_of_file(weights_path(name))
            for name in ("glyph-dit.safetensors", "glyph-classifier.safetensors")
        ],
    }
    curves = None
    if any(isinstance(setting.policy, Calibrated) for setting in options.grid):
        curves = error_curves(
            model,
            sampler,
            out / "results" / "calibration-curves.json",
            fingerprint_of(**base),
            options.pictures,
        )
    trial = _trial(model, sampler)
    grid = tuple(_planned(setting, model, options, store, curves, base, trial) for setting in options.grid)
    return FrontierPlan(
        model, options, store, grid, tuple(planned for planned in grid if planned.setting in wanted), trial
    )


def _planned(
    setting: FrontierSetting,
    model: DiT,
    options: FrontierOptions,
    store: Store,
    curves: ErrorCurves | None,
    base: dict[str, object],
    trial: float,
) -> Planned:
    policy = setting.policy
    fields: dict[str, object] = {}
    if isinstance(policy, Calibrated) and curves is not None:
        found = calibrated(curves, policy, options.sampler)
        fields = {
            "target_speedup": policy.target_speedup,
            "per_layer": policy.per_layer,
            "threshold": found.threshold,
        }
        policy = found.policy()
    schedule = None
    if isinstance(policy, Policy):
        fields |= policy.fields()
        schedule = policy.schedule(options.sampler.steps, recognise(model).layout())
    plan = None if schedule is None else hashlib.sha256(schedule.to_json().encode()).hexdigest()
    fingerprint = fingerprint_of(
        **base, plan=plan, fields=fields, pictures=options.pictures, comparisons=options.comparisons
    )
    there, stale = store.row(setting.slug, fingerprint) is not None, store.stale(setting.slug, fingerprint)
    compared = (
        0 if schedule is None else min(options.pictures, options.comparisons * options.sampler.batch_size)
    )
    ideal = 1.0 if schedule is None else schedule.ideal_speedup()
    seconds = 0.0 if there else trial * (options.pictures / ideal + compared)
    return Planned(
        setting,
        policy if isinstance(policy, Policy) else None,
        schedule,
        fields,
        fingerprint,
        "there" if there else "stale" if stale else "new",
        seconds,
    )


def _trial(model: DiT, sampler: Sampler) -> float:
    """Seconds of a picture uncached, by the second of two short runs."""
    short = replace(sampler, steps=min(TRIAL_STEPS, sampler.steps))
    for _ in range(2):
        begun = time.perf_counter()
        short.run(model, range(sampler.batch_size), None)
        seconds = time.perf_counter() - begun
    return seconds / sampler.batch_size * sampler.steps / short.steps
