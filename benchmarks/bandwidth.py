"""The ceiling: how fast this machine copies and reads memory, measured in the run that it judges."""

from dataclasses import dataclass

import torch

from benchmarks.machine import last_level_cache_bytes
from benchmarks.timing import Effort, Timing, measure

BRIEF = Effort(1.5, 9, 60)
CACHES = 8  # a buffer is this many last-level caches


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes) of `copy_` (bytes read plus written) and of `sum` (read only), on `threads` threads."""

    threads: int
    buffer_bytes: int
    copy_gbps: float
    read_gbps: float
    copy: Timing
    read: Timing


def measure_bandwidth(device: torch.device, effort: Effort = BRIEF, caches: int = CACHES) -> Bandwidth:
    """Copy one float32 buffer beyond the caches into another, and sum it."""
    nbytes = caches * last_level_cache_bytes(device)
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    found = measure({"copy": [lambda: target.copy_(source)], "read": [source.sum]}, effort, device)
    copy, read = found["copy"], found["read"]
    return Bandwidth(
        torch.get_num_threads(),
        nbytes,
        2e-3 * nbytes / copy.median_us,
        1e-3 * nbytes / read.median_us,
        copy,
        read,
    )


def ceiling(bursts: list[Bandwidth], threads: int) -> float:
    """GB/s that shares refer to: the best of the copy bandwidths that the run measured on `threads` threads."""
    return max(burst.copy_gbps for burst in bursts if burst.threads == threads)
