"""Stage `build`: the libraries for the GPU of this machine, in the source tree."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gate.prerequisites import compute_capabilities, tool, version
from benchmarks.gate.stage import Failed, Stage, run

ROOT = Path(__file__).resolve().parents[2]
DRY_ARCHITECTURE = "90"
LAST_LINES = 12  # of a failed build's output that go into the results


def build(stage: Stage) -> None:
    """Build with FASTCACHE_CUDA=1 for the compute capabilities that are here."""
    for name in ("nvcc", "cmake"):
        found = tool(name)
        if not found.path:
            raise Failed(
                f"{name} was not found, so the CUDA kernels are not built and only Triton is tested and measured. Fix: {found.fix}"
            )
    capabilities = [DRY_ARCHITECTURE] if stage.dry_run else compute_capabilities()
    if not capabilities:
        raise Failed("nvidia-smi tells no compute capability, so there is nothing to build for")
    architectures = ";".join(f"{capability}-real" for capability in capabilities)
    environment = os.environ | {
        "FASTCACHE_CUDA": "1",
        "FASTCACHE_CUDA_ARCHS": architectures,
        "PATH": os.pathsep.join((os.path.dirname(tool("nvcc").path), os.environ.get("PATH", ""))),
    }
    begun = time.monotonic()
    commands = (
        with_cmake(architectures)
        if too_old(version("setuptools"))
        else [[sys.executable, "setup.py", "build_ext", "--inplace"]]
    )
    for command in commands:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode != 0:
            stage.put(output=done.stdout.splitlines()[-LAST_LINES:])
            raise Failed(f"the build failed; its last lines are in `output`: {first_error(done.stdout)}")
    libraries = {path.name: path.stat().st_size for path in sorted((ROOT / "fastcache" / "lib").glob("*.so"))}
    stage.put(
        architectures=architectures,
        seconds=round(time.monotonic() - begun, 1),
        libraries=libraries,
        with_setuptools=len(commands) == 1,
    )
    if "libfastcache_cuda.so" not in libraries:
        raise Failed(
            "the build ended without libfastcache_cuda.so; run `FASTCACHE_CUDA=1 python setup.py build_ext --inplace` to see why"
        )
    stage.say(f"built {', '.join(libraries)} for {architectures}")
    check_import(stage)


def first_error(output: str) -> str:
    """The first line that speaks of an error, and the next one, which says which."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    place = next(
        (number for number, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)),
        max(0, len(lines) - 2),
    )
    return " ".join(lines[place : place + 2])


def check_import(stage: Stage) -> None:
    """A fresh process must load what was built, and choose it where there is a GPU."""
    code = "import torch, fastcache; s = fastcache.backends_status(); print({name: (one.available, one.reason) for name, one in s.items()})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    if done.returncode != 0:
        raise Failed(f"what was built cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    stage.put(backends=done.stdout.strip())
    stage.say(done.stdout.strip())


def too_old(setuptools: str) -> bool:
    """setup.py refuses versions before 77, and then CMake is run without it."""
    return not setuptools or int(setuptools.split(".")[0]) < 77


def with_cmake(architectures: str) -> list[list[str]]:
    """What setup.py runs, for machines whose setuptools is too old for it."""
    folder, cmake, ninja = str(ROOT / "build" / "gate"), tool("cmake").path, tool("ninja").path
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        folder,
        *generator,
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFASTCACHE_OUTPUT={ROOT / 'fastcache'}",
        "-DFASTCACHE_CUDA=1",
        f"-DFASTCACHE_CUDA_ARCHS={architectures}",
    ]
    return [configure, [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)]]


if __name__ == "__main__":
    run("build", build)
