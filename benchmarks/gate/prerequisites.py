"""What this machine has of what the gate needs, and how to get the rest. Starts no CUDA context."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass

from fastcache.workshop.environment import processor_name

REQUIRED = {"torch": "everything", "numpy": "torch and fastcache", "pytest": "tests and sanitizer"}
OPTIONAL = {"triton": "Triton kernels and torch.compile", "xdist": "tests in several processes"}
FIXES = {
    "cmake": "pip install cmake ninja",
    "nvcc": "install the CUDA toolkit, or put its bin folder into PATH",
    "compute-sanitizer": "it comes with the CUDA toolkit",
    "nvidia-smi": "it comes with the driver",
}


@dataclass(frozen=True)
class Tool:
    """A program: where it is ("" if absent), and what to do without it."""

    path: str
    fix: str


def tool(name: str) -> Tool:
    """A program of this environment, else of PATH, else of the CUDA toolkit."""
    homes = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [sysconfig.get_path("scripts"), None, *(os.path.join(home, "bin") for home in homes if home)]
    found = next((path for path in (shutil.which(name, path=place) for place in places) if path), "")
    return Tool(found, FIXES[name])


def missing(packages: dict[str, str]) -> dict[str, str]:
    """Those that cannot be imported, with what needs them."""
    return {name: why for name, why in packages.items() if importlib.util.find_spec(name) is None}


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


def facts() -> dict[str, object]:
    """What the results say of the machine; no paths, no names of hosts."""
    installed = [name for name in (*REQUIRED, "triton") if not missing({name: ""})]
    return {
        "gpus": query("name", "driver_version", "memory.total"),
        "compute_capabilities": compute_capabilities(),
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in installed},
        "tools": {name: bool(tool(name).path) for name in FIXES},
        "absent": missing(OPTIONAL),
    }
