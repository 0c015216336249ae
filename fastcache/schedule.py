"""The plan by its public name; it lives in fastcache.plan."""

from fastcache.plan.actions import COMPUTE, REUSE, Action, Kind, forecast, refresh
from fastcache.plan.layout import Branch, Layout
from fastcache.plan.schedule import FORMAT, Schedule
from fastcache.plan.selection import Score, Selection
from fastcache.plan.step import StepPlan, full_step, skip_step, uniform_step

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
