"""The plan by its public name; it lives in fastcache.plan."""

from fastcache.plan.schedule import (
    COMPUTE,
    FORMAT,
    REUSE,
    Action,
    Branch,
    Kind,
    Layout,
    Schedule,
    Score,
    Selection,
    StepPlan,
    forecast,
    full_step,
    refresh,
    skip_step,
    uniform_step,
)

__all__ = [
    "COMPUTE",
    "FORMAT",
    "REUSE",
    "Action",
    "Branch",
    "Kind",
    "Layout",
    "Schedule",
    "Score",
    "Selection",
    "StepPlan",
    "forecast",
    "full_step",
    "refresh",
    "skip_step",
    "uniform_step",
]
