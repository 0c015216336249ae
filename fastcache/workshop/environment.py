"""Where a report's numbers were measured."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcache import backends
from fastcache.version import __version__


@dataclass(frozen=True)
class Environment:
    """The versions and the machine behind a measurement; no paths and no names of people or hosts."""

    fastcache: str
    torch: str
    python: str
    processor: str
    device: str
    threads: int
    backend: str


def environment(
    device: torch.device = torch.device("cpu"), dtype: torch.dtype = torch.float32
) -> Environment:
    """The environment of work on `device` in `dtype`; `backend` is the one that runs there."""
    return Environment(
        fastcache=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        processor=processor_name(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        backend=backends.chosen_name(device, dtype),
    )


def processor_name() -> str:
    """The CPU's own name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
