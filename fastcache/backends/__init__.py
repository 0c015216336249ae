"""Which kernel runs where: the only place that chooses a backend.

    device  order of preference
    cpu     cpp, eager
    cuda    cuda, triton, eager
    other   eager

The first that has a kernel of the operator runs it (`IMPLEMENTS`; `fastcache doctor` shows the gaps).
`FASTCACHE_BACKEND=<name>` or `use_backend("<name>")` forces one for the operators it has, and fails
where it cannot run; operators it has no kernel of go on to the next in order. float64 is the
reference type and always runs in eager. While torch.compile traces, the registered operator is
called, whose kernel is the first available one of the device. A GPU backend checks an operator
against eager before its first use on a device; if it disagrees, the next one is taken and a warning
says so. Triton also runs on a CPU where TRITON_INTERPRET=1 is set and it is forced.
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
from typing import Any

import torch

from fastcache.backends import eager, library, selfcheck, tuning

logger = logging.getLogger(__name__)

NAMES = ("cpp", "cuda", "triton", "eager")
ORDER = {"cpu": ("cpp", "eager"), "cuda": ("cuda", "triton", "eager")}
STREAM = frozenset({"residual_update", "residual_update_scatter_"})
TOKENS = frozenset({"select_tokens_", "row_score", "value_norm", "relative_error"})
ATTENTION = frozenset({"attention_received"})
IMPLEMENTS = {
    "cpp": STREAM | TOKENS | ATTENTION,
    "cuda": STREAM | TOKENS,
    "triton": STREAM | ATTENTION,
    "eager": frozenset(library.OPERATORS),
}


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


def choose(device: torch.device, dtype: torch.dtype, operator: str = "residual_update") -> ModuleType:
    """The backend module that runs an operator on `device` for x of `dtype`.

    Raises BackendError if a forced backend cannot run there.
    """
    name = _forced.get()
    if name is not None:
        return _forced_or_next(name, device, dtype, operator)
    if dtype is torch.float64:
        return eager
    return _CHOICE.get((operator, device.type)) or _first_that_agrees(device, operator)


def traced(dtype: torch.dtype) -> Any:
    """What torch.compile sees: the registered operators, and plain PyTorch for float64."""
    return eager if dtype is torch.float64 else torch.ops.fastcache


def chosen_name(
    device: torch.device, dtype: torch.dtype = torch.float32, operator: str = "residual_update"
) -> str:
    """Name of the backend that `choose` returns, for reports."""
    chosen = choose(device, dtype, operator)
    names = NAMES if _forced.get() is not None else ORDER.get(device.type, ("eager",))
    return next(
        name
        for name in names
        if _STATUS[name].available and operator in IMPLEMENTS[name] and _module(name) is chosen
    )


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


def _forced_or_next(name: str, device: torch.device, dtype: torch.dtype, operator: str) -> ModuleType:
    """The forced backend, or the next after it in order if it has no kernel of this operator."""
    if name == "eager":
        return eager
    order = ORDER.get(device.type, ("eager",))
    if name not in order and not (name == "triton" and _interpreted()):
        raise BackendError(f"backend {name!r} was forced, but x is on {device}: it runs {', '.join(order)}")
    if dtype is torch.float64:
        raise BackendError(f"backend {name!r} was forced, but x is float64: only eager computes in float64")
    if operator in IMPLEMENTS[name]:
        if name == "cuda":
            tuning.ready(device)
        return _module(name)
    return next(
        _module(other)
        for other in order
        if other != name and _STATUS[other].available and operator in IMPLEMENTS[other]
    )


@functools.cache
def _module(name: str) -> ModuleType:
    """The module of a backend; Triton is imported at its first use."""
    if name == "triton":
        return importlib.import_module("fastcache.backends.triton")
    return eager if name == "eager" else native


def _first_that_agrees(device: torch.device, operator: str) -> ModuleType:
    """The first available backend of a device that has the operator and agrees with eager."""
    for name in ORDER.get(device.type, ("eager",)):
        if _STATUS[name].available and operator in IMPLEMENTS[name] and _agrees(name, device, operator):
            return _module(name)
    return eager


def _agrees(name: str, device: torch.device, operator: str) -> bool:
    """Whether a backend agrees with eager; checked once per operator and device, and loudly refused if
    not.
    """
    key = (name, device, operator)
    if name == "eager" or key in _AGREED:
        return name == "eager" or _AGREED[key]
    if _capturing():
        return True  # nothing can be checked while a graph is captured, and nothing is remembered
    tuning.ready(device)
    error = selfcheck.disagreement(_module(name), device, operator)
    if error:
        logger.warning(
            "backend %s disagrees with eager on %s and will not run %s: %s", name, device, operator, error
        )
    _AGREED[key] = not error
    return not error


def _capturing() -> bool:
    return not selfcheck.possible()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_reason() -> str:
    """Why Triton cannot run here, "" if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
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
        "triton": BackendStatus(
            "triton",
            not _triton_reason(),
            _triton_reason()
            or ("interpreted on the CPU, when forced" if not has_gpu else "compiled at first use"),
        ),
        "eager": BackendStatus("eager", True, "plain PyTorch, the definition"),
    }


_STATUS = _statuses()
_CHOICE = {
    (operator, "cpu"): native if _STATUS["cpp"].available and operator in IMPLEMENTS["cpp"] else eager
    for operator in library.OPERATORS
}
_AGREED: dict[tuple[str, torch.device, str], bool] = {}
_forced: ContextVar[str | None] = ContextVar(
    "fastcache_backend",
    default=_known(os.environ.get("FASTCACHE_BACKEND") or None, "FASTCACHE_BACKEND"),  # noqa: B039 (a string)
)
