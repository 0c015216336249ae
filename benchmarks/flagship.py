"""The claim to hold: the trunk of DiT-XL/2 at 256 px as one sum, on one thread."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.bandwidth import Bandwidth
from benchmarks.cases import Case
from benchmarks.forms import Absence, Row, measure_case
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

    title: str
    rows: tuple[Row, ...]
    absent: tuple[Absence, ...]
    bandwidth: Bandwidth
    verdicts: tuple[Verdict, ...]


def measure_flagship(
    case: Case, device: torch.device, effort: Effort, providers: Sequence[Provider], bandwidth: Bandwidth
) -> Flagship:
    """The case on the threads that PyTorch now has, one; `bandwidth` was measured on as many."""
    measured = measure_case(case, device, effort, providers)
    rows = tuple(row.against(bandwidth.copy_gbps) for row in measured.rows)
    ours = next((row for row in rows if row.provider == Provider.OURS.value), None)
    naive, compiled = (None, None) if ours is None else (ours.vs_naive, ours.vs_compile)
    verdicts = (
        Verdict(Provider.NAIVE.value, BARS[Provider.NAIVE], naive),
        Verdict(f"{Provider.NAIVE.value} (aim)", AIM, naive),
        Verdict(Provider.COMPILED.value, BARS[Provider.COMPILED], compiled),
    )
    size, count = (
        case.size,
        "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads",
    )
    title = f"{case.terms} gated {case.dtype_name} terms of [{size.batch}, {size.tokens}, {size.channels}] ({size.name}), {count}"
    return Flagship(title, rows, measured.absent, bandwidth, verdicts)
