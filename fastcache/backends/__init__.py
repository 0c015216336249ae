"""Which kernel runs where: the only place that chooses a backend.

    device  order of preference
    cpu     cpp, eager
    cuda    cuda, triton, eager
    other   eager

`FASTCACHE_BACKEND=<name>` or `use_backend("<name>")` forces one, and fails where it cannot run.
float64 is the reference type and always runs in eager. While torch.compile traces, the registered
operator is called, whose kernel is the first available one of the device.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

from fastcache.backends import eager, library

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


def status() -> dict[str, BackendStatus]:
    """Every backend by name, whether it can run here, and if not, why not."""
    return dict(_STATUS)


def choose(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module that runs an operator on `device` for x of `dtype`.

    Raises BackendError if a forced backend cannot run there.
    """
    name = _forced.get()
    if name is None:
        if dtype is torch.float64:
            return eager
        return _CHOICE.get(device.type, eager)
    return _checked(name, device, dtype)


def chosen_name(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that `choose` returns, for reports."""
    if _forced.get() is not None:
        _checked(_forced.get(), device, dtype)
        return _forced.get()
    if dtype is torch.float64:
        return "eager"
    return next(name for name in ORDER.get(device.type, ("eager",)) if _STATUS[name].available)


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
    if name not in ORDER.get(device.type, ()):
        raise BackendError(f"backend {name!r} was forced, but x is on {device}: it runs {', '.join(ORDER.get(device.type, ('eager',)))}")
    if dtype is torch.float64:
        raise BackendError(f"backend {name!r} was forced, but x is float64: only eager computes in float64")
    return native


def _statuses() -> dict[str, BackendStatus]:
    cpu, cuda = LIBRARIES["cpu"], LIBRARIES["cuda"]
    has_gpu = torch.cuda.is_available()
    cuda_reason = cuda.reason if has_gpu or not cuda.loaded else "built, but PyTorch sees no GPU"
    return {
        "cpp": BackendStatus("cpp", cpu.loaded, cpu.reason),
        "cuda": BackendStatus("cuda", cuda.loaded and has_gpu, cuda_reason),
        "triton": BackendStatus("triton", False, "this version has no Triton kernels yet"),
        "eager": BackendStatus("eager", True, "plain PyTorch, the definition"),
    }


_STATUS = _statuses()
_CHOICE = {"cpu": native if _STATUS["cpp"].available else eager, "cuda": native if _STATUS["cuda"].available else eager}
_forced: ContextVar[str | None] = ContextVar("fastcache_backend", default=_known(os.environ.get("FASTCACHE_BACKEND") or None, "FASTCACHE_BACKEND"))
