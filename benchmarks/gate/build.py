"""Stage `build`: the libraries for the GPU of this machine, in the source tree."""

import os
import re
import subprocess
import sys

from benchmarks.gate.prerequisites import compute_capabilities, tool
from benchmarks.gate.stage import ROOT, Failed, Stage, run

DRY_ARCHITECTURE = "90"
LAST_LINES = 12  # of a failed build's output that go into the results
IMPORT = (
    "import torch, fastcache; status = fastcache.backends_status(); "
    "print({name: (one.available, one.reason) for name, one in status.items()})"
)


def build(stage: Stage) -> None:
    """Build with FASTCACHE_CUDA=1 for the compute capabilities that are here, and load what was built."""
    for name in ("nvcc", "cmake"):
        if not tool(name).path:
            without = "the CUDA kernels are not built and only Triton is tested and measured"
            raise Failed(f"{name} was not found, so {without}. Fix: {tool(name).fix}")
    capabilities = [DRY_ARCHITECTURE] if stage.dry_run else compute_capabilities()
    if not capabilities:
        raise Failed("nvidia-smi tells no compute capability, so there is nothing to build for")
    architectures = ";".join(f"{capability}-real" for capability in capabilities)
    path = os.pathsep.join((os.path.dirname(tool("nvcc").path), os.environ.get("PATH", "")))
    environment = {"FASTCACHE_CUDA": "1", "FASTCACHE_CUDA_ARCHS": architectures, "PATH": path}
    output_of(stage, ["setup.py", "build_ext", "--inplace"], environment, "the build failed")
    libraries = {path.name: path.stat().st_size for path in sorted((ROOT / "fastcache" / "lib").glob("*.so"))}
    stage.put(architectures=architectures, libraries=libraries)
    if "libfastcache_cuda.so" not in libraries:
        fix = "run `FASTCACHE_CUDA=1 python setup.py build_ext --inplace` to see why"
        raise Failed(f"the build ended without libfastcache_cuda.so; {fix}")
    stage.say(f"built {', '.join(libraries)} for {architectures}")
    # a fresh process must load what was built, and choose it where there is a GPU
    output = output_of(stage, ["-c", IMPORT], {}, "what was built cannot be imported").strip()
    stage.put(backends=output)
    stage.say(output)


def output_of(stage: Stage, arguments: list[str], environment: dict[str, str], failure: str) -> str:
    """What a run of Python prints. Raises Failed with its first error."""
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, **pipes)
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


if __name__ == "__main__":
    run("build", build)
