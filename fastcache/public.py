"""The public names, from where they live; `fastcache` hands them on."""
# ruff: noqa: F401 (nothing is used here)

from fastcache import ops
from fastcache.backends import BackendError, status as backends_status, use_backend
from fastcache.calibration.calibrated import Calibration
from fastcache.calibration.errors import calibrate
from fastcache.engine.session import Session, accelerate
from fastcache.errors import FastCacheError, HostError, ScheduleError, SessionError
from fastcache.plan.actions import Action
from fastcache.plan.schedule import Schedule
from fastcache.plan.selection import Score, Selection
from fastcache.plan.step import StepPlan
from fastcache.policies import FORA, L2C, DuCa, Policy, SmoothCache, TaylorSeer, ToCa
from fastcache.stream.residual_stream import ResidualStream
