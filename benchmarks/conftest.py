"""Set-up of the pytest-benchmark tests: no gradients, freed memory kept, and the ceiling of this machine."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.bandwidth import Bandwidth, measure_bandwidth
from benchmarks.machine import kept_heap


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operators run."""
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def equal_conditions() -> Iterator[None]:
    """As in benchmarks.run."""
    with torch.no_grad(), kept_heap():
        yield


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> Bandwidth:
    """Copy and read bandwidth, once."""
    return measure_bandwidth(device)
