"""FastCache: feature caching for diffusion transformers, at the cost of its memory traffic."""

from fastcache import ops
from fastcache.backends import BackendError, use_backend
from fastcache.backends import status as backends_status
from fastcache.calibration.errors import calibrate
from fastcache.calibration.scan import Calibration
from fastcache.engine.session import Session, accelerate
from fastcache.errors import FastCacheError, HostError, ScheduleError, SessionError
from fastcache.plan.schedule import Action, Schedule, Score, Selection, StepPlan
from fastcache.policies import FORA, L2C, DuCa, Policy, SmoothCache, TaylorSeer, ToCa
from fastcache.stream.residual_stream import ResidualStream

__version__ = "0.1.0"
__all__ = [
    "FORA",
    "L2C",
    "Action",
    "BackendError",
    "Calibration",
    "DuCa",
    "FastCacheError",
    "HostError",
    "Policy",
    "ResidualStream",
    "Schedule",
    "ScheduleError",
    "Score",
    "Selection",
    "Session",
    "SessionError",
    "SmoothCache",
    "StepPlan",
    "TaylorSeer",
    "ToCa",
    "accelerate",
    "backends_status",
    "calibrate",
    "ops",
    "use_backend",
]
