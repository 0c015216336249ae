"""Builds the compiled parts by running CMake; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation .        wheel
    pip install --no-build-isolation -e .     editable: the libraries land in the source tree
    python setup.py build_ext --inplace       in the source tree, nothing installed

Without --no-build-isolation pip would build in an empty environment, in which the PyTorch that the
libraries are compiled against is not the one they run with; so torch must be there before.

Environment: FASTCACHE_CUDA=1|0|auto, FASTCACHE_CUDA_ARCHS (CMake's list, such as "90-real"),
CMAKE_BUILD_PARALLEL_LEVEL (compile jobs), CMAKE_ARGS (further arguments for CMake).
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SKIPPED = "skipped.txt"  # beside the libraries: why there are none; fastcache/backends/library.py reads it


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt once; it puts all libraries into the package folder."""

    def run(self) -> None:
        in_tree = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "fastcache" if in_tree else Path(self.build_lib).resolve() / "fastcache"
        require_torch()
        if not in_tree:
            shutil.rmtree(package / "lib", ignore_errors=True)  # of an earlier wheel: perhaps no longer built
        record = package / "lib" / SKIPPED
        record.unlink(missing_ok=True)
        if not compilers():
            skip(record)
            return
        cmake = tool("cmake")
        if cmake is None:
            sys.exit("fastcache: cmake was not found. Fix: pip install cmake ninja")
        build = build_folder()
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            *generator(),
            *definitions(package, self.distribution.get_version()),
        ]
        run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        run(
            [
                cmake,
                "--build",
                str(build),
                "--parallel",
                os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1)),
            ]
        )

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def compilers() -> list[str]:
    """The C++ compilers that CMake would look for, as far as they are there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return [name for name in names if shutil.which(shlex.split(name)[0])]


def skip(record: Path) -> None:
    """Without a compiler the package works on eager PyTorch (and Triton); `fastcache doctor` says so."""
    if os.environ.get("FASTCACHE_CUDA") == "1":
        sys.exit("fastcache: FASTCACHE_CUDA=1, but no C++ compiler was found. Fix: install g++ or clang++")
    looked_for = os.environ.get("CXX") or "c++, g++ and clang++"
    reason = (
        "skipped: no C++ compiler was found when the package was installed (looked for"
        f" {looked_for}). Install one, such as g++, and install the package again"
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(reason + "\n")
    print(f"fastcache: compiled kernels {reason}", flush=True)


def definitions(package: Path, version: str) -> list[str]:
    """What CMakeLists.txt must know: this Python, where to put the libraries, what to build."""
    values = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "FASTCACHE_OUTPUT": str(package),
        "FASTCACHE_VERSION": version,
    }
    values["FASTCACHE_CUDA"] = os.environ.get("FASTCACHE_CUDA", "auto")
    if os.environ.get("FASTCACHE_CUDA_ARCHS"):
        values["FASTCACHE_CUDA_ARCHS"] = os.environ["FASTCACHE_CUDA_ARCHS"]
    return [f"-D{name}={value}" for name, value in values.items()]


def generator() -> list[str]:
    ninja = tool("ninja")
    if ninja is None:
        print(
            "fastcache: ninja was not found, building with CMake's default generator; pip install ninja is"
            " faster"
        )
        return []
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]


def build_folder() -> Path:
    """One per Python environment and generator, so that a second build is incremental."""
    key = hashlib.sha256(f"{sys.prefix} {sys.version} {tool('ninja') is None}".encode()).hexdigest()[:8]
    return ROOT / "build" / f"cmake-{key}"


def tool(name: str) -> str | None:
    """A program of this environment, else of PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        sys.exit(f"fastcache: the build failed in: {' '.join(command)}\nThe messages above say why.")


def require_setuptools() -> None:
    """pyproject.toml names its licence in the way that older versions refuse with a riddle."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        sys.exit(
            f"fastcache: setuptools {setuptools.__version__} is too old. Fix: pip install --upgrade"
            " 'setuptools>=77' wheel"
        )


def is_isolated() -> bool:
    """True in the temporary environment that pip and others make for a build."""
    marks = ("pip-build-env", "build-env-", "uv/builds", "pip-isolated")
    return any(mark in entry for entry in sys.path for mark in marks)


def require_torch() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    if is_isolated():
        sys.exit(
            "fastcache: pip builds in an isolated environment, in which the torch that you have is not; its"
            " headers are needed.\nFix: pip install --no-build-isolation ."
        )
    sys.exit(
        f"fastcache: torch is not installed in the build environment ({sys.prefix}); its headers are"
        " needed.\nFix: install torch>=2.10 for your device first (https://pytorch.org/get-started),"
        " then\n    pip install cmake ninja pybind11 'setuptools>=77' wheel\n    pip install"
        " --no-build-isolation ."
    )


require_setuptools()
setup(ext_modules=[Extension("fastcache._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
