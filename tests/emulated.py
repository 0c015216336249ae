"""The CUDA kernels on a CPU: csrc/cuda compiled by g++ against tests/emulator, as operators of CPU tensors.

Everything but csrc/cuda/runtime.cu and register.cpp is the code that runs on a GPU: checks, launch
parameters, the choice of kernel, kernels.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cases
import pytest
import torch
from processes import ROOT

from fastcache.ops import ResidualUpdate

EMULATOR = ROOT / "tests" / "emulator"
TOKENS = ("select_tokens", "row_score", "relative_error")
SHARED = (
    *(f"csrc/{name}.cpp" for name in ("arguments", "boxed", "checks", "token_checks", "overlap")),
    "csrc/cuda/residual_update.cpp",
    "csrc/cuda/parameters.cpp",
    "csrc/cuda/tuning.cpp",
    "csrc/cuda/errors.cu",
    *(f"csrc/cuda/{name}.{kind}" for name in TOKENS for kind in ("cpp", "cu")),
    "tests/emulator/runtime.cpp",
)
TYPES = ("float32", "float16", "bfloat16")
TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Emulated:
    """A library of emulated kernels and its operators."""

    library: ctypes.CDLL
    operators: object

    def call(self, call: cases.Call) -> ResidualUpdate:
        """Run a call of tests/cases.py; asserts that nothing beside the outputs was written."""
        name = "residual_update_scatter_" if call.scatter else "residual_update"
        x, h, errors = getattr(self.operators, name)(**call.arguments)
        a = call.arguments
        damage = self.library.emulator_damage()
        assert damage == 0, f"{damage} bytes beside the outputs were written"
        return ResidualUpdate(
            x if a["need_x"] else None,
            h if a["norm"] else None,
            errors if a["reference"] is not None else None,
        )

    def seed(self, seed: int) -> None:
        """Choose the order in which threads run between barriers."""
        self.library.emulator_seed(seed)

    def multiprocessors(self, count: int) -> None:
        """Say how large the GPU is: the number of rows of a thread depends on it."""
        self.library.emulator_multiprocessors(count)

    def take_errors(self) -> int:
        """Read and clear the sticky flag of bad indices."""
        return self.library.fastcache_cuda_error_flag(0)


def build(name: str = "emulated", *flags: str) -> Emulated:
    """Compile the kernels (once for equal sources, also across processes) and load them."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA kernels are not emulated")
    namespace = f"fastcache_{name}"
    options = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-w",
        "-fvisibility=hidden",
        *(f"-I{folder}" for folder in (EMULATOR, ROOT / "csrc", ROOT / "csrc" / "include")),
    ]
    options += [
        "-isystem",
        str(TORCH / "include"),
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DEMULATED_NAMESPACE={namespace}",
        *flags,
    ]
    library = _folder(compiler, options) / f"{namespace}.so"
    if not library.exists():
        _compile(compiler, options, library)
    torch.ops.load_library(str(library))
    handle = ctypes.CDLL(str(library))
    handle.emulator_damage.restype = ctypes.c_int64
    return Emulated(handle, getattr(torch.ops, namespace))


def _folder(compiler: str, options: list[str]) -> Path:
    digest = hashlib.sha256(repr((compiler, options, torch.__version__)).encode())
    for path in sorted(
        [
            *(ROOT / "csrc").glob("*.*"),
            *(ROOT / "csrc" / "cuda").iterdir(),
            *(ROOT / "csrc" / "include").rglob("*.*"),
            *EMULATOR.iterdir(),
        ]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fastcache-emulated-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return folder


def _compile(compiler: str, options: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:

        def compiled(source: str) -> Path:
            target = Path(folder) / (Path(source).stem + Path(source).suffix[1:] + ".o")
            redirected = (
                ["-Daoti_torch_empty_strided=emulated_empty_strided"]
                if source.endswith("arguments.cpp")
                else []
            )
            _run([compiler, *options, *redirected, "-x", "c++", "-c", str(ROOT / source), "-o", str(target)])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(
                pool.map(compiled, [*(f"csrc/cuda/residual_update_{name}.cu" for name in TYPES), *SHARED])
            )
        linked = Path(folder) / library.name
        _run(
            [
                compiler,
                "-shared",
                "-o",
                str(linked),
                *map(str, objects),
                f"-L{TORCH / 'lib'}",
                "-ltorch_cpu",
                f"-Wl,-rpath,{TORCH / 'lib'}",
            ]
        )
        linked.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
