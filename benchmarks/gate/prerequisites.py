"""What this machine has of what the gate needs, and how to get the rest. Starts no CUDA context."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gate.stage import Failed

REQUIRED = {
    "torch": "nothing runs without it",
    "numpy": "torch and fastcache need it",
    "pytest": "the stages tests and sanitizer need it",
}
OPTIONAL = {
    "triton": "the Triton kernels and torch.compile",
    "pybind11": "build facts for `fastcache doctor`",
    "ninja": "a parallel build",
    "xdist": "tests in several processes",
    "matplotlib": "the picture of `make report`",
}
FIXES = {
    "cmake": "pip install cmake ninja (or bring their wheels)",
    "nvcc": "install the CUDA toolkit, or put its bin folder into PATH",
    "compute-sanitizer": "it comes with the CUDA toolkit",
    "nvidia-smi": "it comes with the driver",
}
VERSIONS = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pybind11", "setuptools")


@dataclass(frozen=True)
class Tool:
    """A program: where it is ("" if absent), and what to do without it."""

    name: str
    path: str
    fix: str


def tool(name: str) -> Tool:
    """A program of this environment, else of PATH, else of the CUDA toolkit."""
    homes = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [sysconfig.get_path("scripts"), None, *(os.path.join(home, "bin") for home in homes if home)]
    found = next((path for path in (shutil.which(name, path=place) for place in places) if path), "")
    return Tool(name, found, FIXES.get(name, f"install {name}"))


def needed(name: str, without: str) -> str:
    """Where a program is. Raises Failed that says what happens without it."""
    found = tool(name)
    if not found.path:
        raise Failed(f"{name} was not found, so {without}. Fix: {found.fix}")
    return found.path


def missing_packages() -> dict[str, str]:
    """Required packages that cannot be imported: {name: what needs it}."""
    return {name: why for name, why in REQUIRED.items() if importlib.util.find_spec(name) is None}


def compute_capabilities() -> list[str]:
    """As the driver tells them, "90" for 9.0; [] where it finds no GPU."""
    return sorted({line.replace(".", "") for line in query("compute_cap") if re.fullmatch(r"\d+\.\d", line)})


def query(*fields: str) -> list[str]:
    """Lines of `nvidia-smi --query-gpu`, one a GPU; [] where it cannot be asked."""
    smi = tool("nvidia-smi")
    command = [smi.path, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20) if smi.path else None
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done and done.returncode == 0 else []


def clocks() -> str | None:
    """SM and memory clock, temperature and power of the first GPU, as seen now; they are never set."""
    return next(iter(query("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")), None)


def version(package: str) -> str:
    """Version of an installed distribution, "" if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def facts() -> dict[str, object]:
    """What the results say of the machine; no paths, no names of hosts."""
    packages, cpu = REQUIRED | OPTIONAL, Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return {
        "gpus": query("name", "driver_version", "memory.total"),
        "compute_capabilities": compute_capabilities(),
        "processor": names[0] if names else "",
        "processors": os.cpu_count(),
        "versions": {name: version(name) for name in VERSIONS},
        "tools": {name: bool(tool(name).path) for name in (*FIXES, "ninja")},
        "absent": {name: why for name, why in packages.items() if importlib.util.find_spec(name) is None},
    }
