"""Which kernel runs where: the only place that chooses a backend.

    device  order of preference
    cpu     cpp, eager
    cuda    cuda, triton, eager
    other   eager

`FASTCACHE_BACKEND=<name>` or `use_backend("<name>")` forces one, and fails where it cannot run.
float64 is the reference type and always runs in eager. While torch.compile traces, the registered
operator is called, whose kernel is the first available one of the device. A GPU backend checks
itself against eager before its first use on a device; if it disagrees, the next one is taken and
a warning says so. Triton also runs on a CPU where TRITON_INTERPRET=1 is set and it is forced.
"""
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

from fastcache.backends import eager, library, selfcheck, tuning

logger = logging.getLogger(__name__)

NAMES = ("cpp", "cuda", "triton", "eager")
ORDER = {"cpu": ("cpp", "eager"), "cuda": ("cuda", "triton", "eager")}


class BackendError(RuntimeError):
    """A backend was forced that cannot run here."""


@dataclass(frozen=True)
class BackendStatus:
    """What `fastcache doctor` shows of one backend."""

    name: str
    available: bool
    reason: str


LIBRARIES = library.register()

from fastcache.backends import native  # noqa: E402  (needs the operators to be registered)
from fastcache.backends.index_errors import take_index_errors as take_index_errors  # noqa: E402


def status() -> dict[str, BackendStatus]:
    """Every backend by name, whether it can run here, and if not, why not."""
    return dict(_STATUS)


def choose(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module that runs an operator on `device` for x of `dtype`.

    Raises BackendError if a forced backend cannot run there.
    """
    name = _forced.get()
    if name is not None:
        return _checked(name, device, dtype)
    if dtype is torch.float64:
        return eager
    return _CHOICE.get(device.type) or _first_that_agrees(device)


def traced(dtype: torch.dtype):
    """What torch.compile sees: the registered operators, and plain PyTorch for float64."""
    return eager if dtype is torch.float64 else torch.ops.fastcache


def chosen_name(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that `choose` returns, for reports."""
    if _forced.get() is not None:
        _checked(_forced.get(), device, dtype)
        return _forced.get()
    if dtype is torch.float64:
        return "eager"
    chosen = choose(device, dtype)
    return next(name for name in ORDER.get(device.type, ("eager",)) if _STATUS[name].available and _module(name) is chosen)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for this context (thread or task): cpp, cuda, triton or eager."""
    token = _forced.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str | None, source: str) -> str | None:
    if name is None:
        return None
    if name not in NAMES:
        raise BackendError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    if not _STATUS[name].available:
        raise BackendError(f"{source}: backend {name!r} cannot run here: {_STATUS[name].reason}")
    return name


def _checked(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    if name == "eager":
        return eager
    if name not in ORDER.get(device.type, ()) and not (name == "triton" and _interpreted()):
        raise BackendError(f"backend {name!r} was forced, but x is on {device}: it runs {', '.join(ORDER.get(device.type, ('eager',)))}")
    if dtype is torch.float64:
        raise BackendError(f"backend {name!r} was forced, but x is float64: only eager computes in float64")
    if name == "cuda":
        tuning.ready(device)
    return _module(name)


@functools.cache
def _module(name: str) -> ModuleType:
    """The module of a backend; Triton is imported at its first use."""
    if name == "triton":
        return importlib.import_module("fastcache.backends.triton")
    return eager if name == "eager" else native


def _first_that_agrees(device: torch.device) -> ModuleType:
    """The first available backend of a device that agrees with eager; checked once per device."""
    if device in _AGREED:
        return _AGREED[device]
    for name in ORDER.get(device.type, ("eager",)):
        if not _STATUS[name].available:
            continue
        if name == "eager" or _capturing():
            break  # nothing can be checked while a graph is captured, and nothing is remembered
        tuning.ready(device)
        error = selfcheck.disagreement(_module(name), device)
        if not error:
            break
        logger.warning("backend %s disagrees with eager on %s and will not be used: %s", name, device, error)
    if not _capturing():
        _AGREED[device] = _module(name)
    return _module(name)


def _capturing() -> bool:
    return not selfcheck.possible()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_reason() -> str:
    """Why Triton cannot run here, "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastcache-dit[triton]')"
    if torch.cuda.is_available() or _interpreted():
        return ""
    return "PyTorch sees no GPU (TRITON_INTERPRET=1 interprets the kernels on a CPU, for tests)"


def _statuses() -> dict[str, BackendStatus]:
    cpu, cuda = LIBRARIES["cpu"], LIBRARIES["cuda"]
    has_gpu = torch.cuda.is_available()
    cuda_reason = cuda.reason if has_gpu or not cuda.loaded else "built, but PyTorch sees no GPU"
    return {
        "cpp": BackendStatus("cpp", cpu.loaded, cpu.reason),
        "cuda": BackendStatus("cuda", cuda.loaded and has_gpu, cuda_reason),
        "triton": BackendStatus("triton", not _triton_reason(), _triton_reason() or ("interpreted on the CPU, when forced" if not has_gpu else "compiled at first use")),
        "eager": BackendStatus("eager", True, "plain PyTorch, the definition"),
    }


_STATUS = _statuses()
_CHOICE = {"cpu": native if _STATUS["cpp"].available else eager}
_AGREED: dict[torch.device, ModuleType] = {}
_forced: ContextVar[str | None] = ContextVar("fastcache_backend", default=_known(os.environ.get("FASTCACHE_BACKEND") or None, "FASTCACHE_BACKEND"))
