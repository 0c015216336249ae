"""FastCache: feature caching for diffusion transformers, at the cost of its memory traffic."""
from fastcache import ops
from fastcache.backends import BackendError, status as backends_status, use_backend
from fastcache.errors import FastCacheError, HostError, ScheduleError, SessionError
from fastcache.policies import FORA, DuCa, Policy, ToCa
from fastcache.schedule import Action, Schedule, Score, Selection, StepPlan
from fastcache.session import Session, accelerate
from fastcache.stream import ResidualStream

__version__ = "0.1.0"
__all__ = [
    "DuCa", "FORA", "ToCa", "Action", "BackendError", "FastCacheError", "HostError", "Policy", "ResidualStream", "Schedule", "ScheduleError", "Score", "Selection", "Session", "SessionError", "StepPlan",
    "accelerate", "backends_status", "ops", "use_backend",
]
