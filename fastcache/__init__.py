"""FastCache: feature caching for diffusion transformers, at the cost of its memory traffic."""
# ruff: noqa: F405 (the names of fastcache.public)

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from fastcache.version import __version__ as __version__


def _is_command() -> bool:
    """True in the process of `fastcache ...` and of `python -m fastcache ...`.

    Its help needs no operator, and torch takes seconds to import: there, and only there, a name is imported
    when it is asked for. Everywhere else an import registers the operators at once.
    """
    started = (getattr(sys, "argv", None) or [""])[0]
    if started == "-m":  # Python is looking for the module that it was told to run
        told = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
        return told[:1] == ["fastcache"]
    return started.replace("\\", "/").rpartition("/")[2] in ("fastcache", "fastcache.exe")


if TYPE_CHECKING or not _is_command():
    from fastcache.public import *  # noqa: F403

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


def __getattr__(name: str) -> object:
    if name == "ops" or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fastcache.public"), name)
