"""Stage `build`: the libraries for the GPU of this machine, in the source tree."""

import os
import re
import subprocess
import sys
import time

from benchmarks.gate.prerequisites import compute_capabilities, needed, tool, version
from benchmarks.gate.stage import ROOT, Failed, Stage, run

DRY_ARCHITECTURE = "90"
LAST_LINES = 12  # of a failed build's output that go into the results
IMPORT = (
    "import torch, fastcache; status = fastcache.backends_status(); "
    "print({name: (one.available, one.reason) for name, one in status.items()})"
)


def build(stage: Stage) -> None:
    """Build with FASTCACHE_CUDA=1 for the compute capabilities that are here, and load what was built."""
    without = "the CUDA kernels are not built and only Triton is tested and measured"
    nvcc, _ = (needed(name, without) for name in ("nvcc", "cmake"))
    capabilities = [DRY_ARCHITECTURE] if stage.dry_run else compute_capabilities()
    if not capabilities:
        raise Failed("nvidia-smi tells no compute capability, so there is nothing to build for")
    architectures = ";".join(f"{capability}-real" for capability in capabilities)
    path = os.pathsep.join((os.path.dirname(nvcc), os.environ.get("PATH", "")))
    environment = {"FASTCACHE_CUDA": "1", "FASTCACHE_CUDA_ARCHS": architectures, "PATH": path}
    old = too_old(version("setuptools"))
    setup = [[sys.executable, "setup.py", "build_ext", "--inplace"]]
    begun = time.monotonic()
    for command in with_cmake(architectures) if old else setup:
        output = output_of(stage, command, environment, "the build failed")
    libraries = {path.name: path.stat().st_size for path in sorted((ROOT / "fastcache" / "lib").glob("*.so"))}
    seconds = round(time.monotonic() - begun, 1)
    stage.put(architectures=architectures, seconds=seconds, libraries=libraries, with_setuptools=not old)
    if "libfastcache_cuda.so" not in libraries:
        fix = "run `FASTCACHE_CUDA=1 python setup.py build_ext --inplace` to see why"
        raise Failed(f"the build ended without libfastcache_cuda.so; {fix}")
    stage.say(f"built {', '.join(libraries)} for {architectures}")
    # a fresh process must load what was built, and choose it where there is a GPU
    output = output_of(stage, [sys.executable, "-c", IMPORT], {}, "what was built cannot be imported")
    stage.put(backends=output.strip())
    stage.say(output.strip())


def output_of(stage: Stage, command: list[str], environment: dict[str, str], failure: str) -> str:
    """What a command prints. Raises Failed with its first error."""
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, **pipes)
    if done.returncode != 0:
        stage.put(output=done.stdout.splitlines()[-LAST_LINES:])
        raise Failed(f"{failure}; the last lines are in `output`: {first_error(done.stdout)}")
    return done.stdout


def first_error(output: str) -> str:
    """The first line that speaks of an error, and the next one, which says which."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    place = errors[0] if errors else max(0, len(lines) - 2)
    return " ".join(lines[place : place + 2])


def too_old(setuptools: str) -> bool:
    """setup.py refuses versions before 77, and then CMake is run without it."""
    return not setuptools or int(setuptools.split(".")[0]) < 77


def with_cmake(architectures: str) -> list[list[str]]:
    """What setup.py runs, for machines whose setuptools is too old for it."""
    folder, cmake, ninja = str(ROOT / "build" / "gate"), tool("cmake").path, tool("ninja").path
    defined = {"CMAKE_BUILD_TYPE": "Release", "Python_EXECUTABLE": sys.executable}
    defined |= {
        "FASTCACHE_OUTPUT": ROOT / "fastcache",
        "FASTCACHE_CUDA": 1,
        "FASTCACHE_CUDA_ARCHS": architectures,
    }
    defined |= {"CMAKE_MAKE_PROGRAM": ninja} if ninja else {}
    generator = ["-G", "Ninja"] if ninja else []
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    configure = [cmake, "-S", str(ROOT), "-B", folder, *generator, *flags]
    return [configure, [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)]]


if __name__ == "__main__":
    run("build", build)
