"""Registers the `fastcache` operators with PyTorch, once per process.

Schemas come from csrc/schema.def: through the compiled CPU library where it was built, by reading
the file otherwise. Every device without a kernel of its own runs the eager definition.
"""

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.backends import eager, fakes

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent
SCHEMA_FILE = Path(__file__).with_name("schema.def")
OPERATORS = (
    "residual_update",
    "residual_update_scatter_",
    "select_tokens_",
    "row_score",
    "value_norm",
    "attention_received",
    "relative_error",
)
TRITON_OPERATORS = (
    "residual_update",
    "residual_update_scatter_",
    "attention_received",
)  # those with a kernel in kernels/


@dataclass(frozen=True)
class CompiledLibrary:
    """A compiled kernel library: where it is, whether it runs here, and if not, why not."""

    name: str
    path: Path
    loaded: bool
    reason: str


def schema_text() -> str:
    """The content of csrc/schema.def."""
    return SCHEMA_FILE.read_text()


def schema_digest() -> str:
    """First 16 hex digits of the SHA-256 of schema.def, as compiled into the libraries."""
    return hashlib.sha256(schema_text().encode()).hexdigest()[:16]


def schemas() -> list[str]:
    """Every operator schema of schema.def."""
    return re.findall(r'^FASTCACHE_OP\("(.*)"\)$', schema_text(), re.MULTILINE)


def load(name: str) -> CompiledLibrary:
    """Load lib/libfastcache_<name>.so. Absent is a state; present and broken raises ImportError."""
    path = PACKAGE / "lib" / f"libfastcache_{name}.so"
    if not path.exists():
        absent = (
            f"not built: {path.name} is absent; build it with `pip install --no-build-isolation .` or `make"
            " env`"
        )
        return CompiledLibrary(name, path, False, _why_skipped() or absent)
    try:
        torch.ops.load_library(str(path))
        _refuse_stale(path)
    except (OSError, AttributeError, RuntimeError) as error:
        message = (
            f"fastcache: {path.name} is there but cannot be loaded: {error.__cause__ or error}. Rebuild it"
            " with `pip install --no-build-isolation .` (or delete it to run on eager PyTorch)"
        )
        raise ImportError(message) from error
    return CompiledLibrary(name, path, True, "loaded")


def _why_skipped() -> str:
    """What setup.py wrote if it could not compile anything; empty if it wrote nothing."""
    record = PACKAGE / "lib" / "skipped.txt"
    return record.read_text().strip() if record.is_file() else ""


def _refuse_stale(path: Path) -> None:
    """Raise ImportError if the library, which this process has loaded, was built from another schema.def."""
    digest = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).fastcache_schema_digest
    digest.restype = ctypes.c_char_p
    built = digest().decode()
    if built != schema_digest():
        message = (
            f"fastcache: {path.name} was built from another operator schema ({built}, the sources have"
            f" {schema_digest()}). Rebuild it with `pip install --no-build-isolation .` or `make env`"
        )
        raise ImportError(message)


def _refuse_other_registration() -> None:
    """Raise ImportError if what this process has registered is not what these sources describe."""
    compiled = PACKAGE / "lib" / "libfastcache_cpu.so"
    with contextlib.suppress(OSError):  # not loaded from here: a second copy of the package registered them
        _refuse_stale(compiled)  # an import that was refused leaves its operators behind
    found = {str(getattr(torch.ops.fastcache, name).default._schema) for name in OPERATORS}
    if found != {f"fastcache::{torch._C.parse_schema(schema)}" for schema in schemas()}:
        message = (
            "fastcache: another version of the package has registered its operators in this process; start a"
            " new process, with one version on the path"
        )
        raise ImportError(message)


def cpu_capability(library: CompiledLibrary) -> str:
    """Instruction set that the CPU library uses here (avx512, avx2 or default).

    Raises RuntimeError if FASTCACHE_CPU_CAPABILITY asks for one that cannot run.
    """
    try:
        handle = ctypes.CDLL(str(library.path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return "unknown: another copy of the package registered the operators"
    for name in ("fastcache_cpu_capability", "fastcache_cpu_capability_error"):
        getattr(handle, name).restype = ctypes.c_char_p
    found = handle.fastcache_cpu_capability()
    if found is None:
        raise RuntimeError(handle.fastcache_cpu_capability_error().decode())
    return found.decode()


def registered() -> bool:
    """True if this process already has the operators (a second copy of the package, a reload)."""
    return hasattr(torch.ops.fastcache, OPERATORS[0])


def register() -> dict[str, CompiledLibrary]:
    """Define the operators, load what was compiled, add fake, autograd and fallback kernels."""
    if registered():
        _refuse_other_registration()
        logger.warning(
            "the fastcache operators are already registered in this process; the first registration stays"
        )
        reason = "registered by an earlier import of fastcache in this process"
        return {
            name: CompiledLibrary(name, PACKAGE / "lib" / f"libfastcache_{name}.so", _has_kernel(key), reason)
            for name, key in (("cpu", "CPU"), ("cuda", "CUDA"))
        }
    if os.environ.get("FASTCACHE_NO_COMPILED") == "1":
        absent = "switched off by FASTCACHE_NO_COMPILED=1"
        libraries = {
            name: CompiledLibrary(name, PACKAGE / "lib" / f"libfastcache_{name}.so", False, absent)
            for name in ("cpu", "cuda")
        }
    else:
        libraries = {"cpu": load("cpu")}
        libraries["cuda"] = _load_cuda(libraries["cpu"])
    if not libraries["cpu"].loaded:
        _LIBRARY.append(torch.library.Library("fastcache", "DEF"))
        for schema in schemas():
            _LIBRARY[0].define(schema)
    else:
        _LIBRARY.append(torch.library.Library("fastcache", "IMPL"))
    for name in OPERATORS:
        _LIBRARY[0].impl(name, getattr(eager, name), "CompositeExplicitAutograd")
        _LIBRARY[0].impl(name, _forward_only(name), "Autograd", with_keyset=True)
        torch.library.register_fake(f"fastcache::{name}", getattr(fakes, name))
    if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
        for name in TRITON_OPERATORS:
            if not _has_kernel("CUDA", name):
                _LIBRARY[0].impl(name, _triton(name), "CUDA")
    return libraries


def _load_cuda(cpu: CompiledLibrary) -> CompiledLibrary:
    path = PACKAGE / "lib" / "libfastcache_cuda.so"
    if not path.exists():
        return CompiledLibrary(
            "cuda",
            path,
            False,
            "not built: needs FASTCACHE_CUDA=1, or a CUDA build of torch and a CUDA compiler",
        )
    if torch.version.cuda is None:
        return CompiledLibrary("cuda", path, False, f"built, but torch {torch.__version__} is a CPU build")
    if not cpu.loaded:
        return CompiledLibrary(
            "cuda", path, False, "the CPU library, which defines the operators, is not loaded"
        )
    return load("cuda")


_LIBRARY: list[torch.library.Library] = []  # kept alive: dropping it would unregister the kernels


def _has_kernel(key: str, operator: str = OPERATORS[0]) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcache::{operator}", key)


def refuse_grad(tensors: Iterable[object]) -> None:
    """Raise if any of `tensors` would need a gradient now: the operators are forward-only."""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            "fastcache operators are forward-only: an input requires grad in grad mode. Sample under"
            " torch.no_grad() or torch.inference_mode(), or detach the input"
        )


def _forward_only(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.fastcache, name).default

    written = [
        (position, argument.name)
        for position, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def forward_only(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_grad(torch.utils._pytree.tree_leaves((args, kwargs)))
        outputs = op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)
        for position, argument in written:
            tensor = args[position] if position < len(args) else kwargs.get(argument)
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return outputs

    return forward_only


def _triton(name: str) -> Callable[..., Any]:
    def launch(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("fastcache.backends.triton"), name)(*args, **kwargs)

    return launch
