"""The machine: caches, memory and bandwidth, and what is kept equal for all contenders."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gate.stage import now
from benchmarks.timing import Effort, Timing, measure
from fastcache import backends
from fastcache.backends.library import cpu_capability
from fastcache.workshop.environment import environment

UNKNOWN_CACHE = 32 << 20
CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY_FILE = Path("/proc/meminfo")
# of glibc's mallopt: number and value
MMAP_MAX, TRIM_THRESHOLD = -4, -1
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}
BRIEF = Effort(1.5, 9, 60)
CACHES = 8  # a buffer of the bandwidth is this many last-level caches
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}


def machine(device: torch.device) -> dict[str, object]:
    """Where and when a run is made, and whether the machine is busy."""
    library = backends.LIBRARIES["cpu"]
    return {
        "environment": asdict(environment(device, torch.bfloat16)),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fastcache_cpu_capability": cpu_capability(library) if library.loaded else library.reason,
        "last_level_cache_bytes": last_level_cache_bytes(device),
        "load": os.getloadavg()[0],
        "date": now(),
    }


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the cache before memory; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in CACHE_FOLDER.glob("index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units]
    return max(sizes, default=UNKNOWN_CACHE)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated now, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = MEMORY_FILE.read_text().splitlines() if MEMORY_FILE.exists() else []
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


@contextmanager
def kept_heap() -> Iterator[bool]:
    """Let glibc keep freed memory while this lasts; gives False where there is no glibc.

    Left alone, it returns every tensor beyond 32 MiB to the kernel, and calls mostly wait for page faults.
    Caching allocators (CUDA's, jemalloc, tcmalloc) do not; this makes the host's behave like them.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    try:
        yield known and all(libc.mallopt(name, value) for name, value in KEPT.items())
    finally:
        if known:
            for name, value in DEFAULTS.items():
                libc.mallopt(name, value)
            libc.malloc_trim(0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run PyTorch's CPU operators, and ours, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes) of `copy_` (bytes read plus written) and of `sum` (read only)."""

    threads: int
    buffer_bytes: int
    copy_gbps: float
    read_gbps: float
    copy: Timing
    read: Timing


def measure_bandwidth(device: torch.device, effort: Effort = BRIEF, caches: int = CACHES) -> Bandwidth:
    """The ceiling of a run: copy one float32 buffer beyond the caches into another, and sum it."""
    nbytes = caches * last_level_cache_bytes(device)
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    found = measure({"copy": [lambda: target.copy_(source)], "read": [source.sum]}, effort, device)
    rates = 2e-3 * nbytes / found["copy"].median_us, 1e-3 * nbytes / found["read"].median_us
    return Bandwidth(torch.get_num_threads(), nbytes, *rates, found["copy"], found["read"])
