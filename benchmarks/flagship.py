"""The claim to hold: the trunk of DiT-XL/2 at 256 px as one sum, on one thread."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.bandwidth import Bandwidth, measure_bandwidth
from benchmarks.cases import FLAGSHIP, Case
from benchmarks.forms import Absence, Row, measure_case
from benchmarks.machine import threads
from benchmarks.providers import Provider
from benchmarks.timing import Effort

BARS = {Provider.NAIVE: 2.6, Provider.COMPILED: 1.9}  # times faster than these, at least
AIM = 3.5  # times faster than the naive sequence


@dataclass(frozen=True)
class Verdict:
    """One bar: how many times faster than `against` FastCache is, and whether that is enough. None: not measured."""

    against: str
    bar: float
    found: float | None

    @property
    def text(self) -> str:
        """The verdict in words."""
        if self.found is None:
            return f"bar of {self.bar}x against {self.against}: not measured"
        return f"bar of {self.bar}x against {self.against}: {'held' if self.found >= self.bar else '**missed**'}, {self.found:.2f}x"


@dataclass(frozen=True)
class Flagship:
    """The rows of the case and what they say; rows have their share of the one-thread copy bandwidth."""

    rows: tuple[Row, ...]
    absent: tuple[Absence, ...]
    bandwidth: Bandwidth
    verdicts: tuple[Verdict, ...]


def measure_flagship(device: torch.device, effort: Effort, *, case: Case = FLAGSHIP, providers: Sequence[Provider] = tuple(Provider), caches: int = 8) -> Flagship:
    """56 gated bf16 terms of [2, 256, 1152], one thread."""
    with threads(1):
        bandwidth = measure_bandwidth(device, caches=caches)
        measured = measure_case(case, device, effort, providers)
    rows = tuple(row.against(bandwidth.copy_gbps) for row in measured.rows)
    ours = next((row for row in rows if row.provider == Provider.OURS.value), None)
    naive, compiled = (None, None) if ours is None else (ours.vs_naive, ours.vs_compile)
    verdicts = (
        Verdict(Provider.NAIVE.value, BARS[Provider.NAIVE], naive),
        Verdict(f"{Provider.NAIVE.value} (aim)", AIM, naive),
        Verdict(Provider.COMPILED.value, BARS[Provider.COMPILED], compiled),
    )
    return Flagship(rows, measured.absent, bandwidth, verdicts)
