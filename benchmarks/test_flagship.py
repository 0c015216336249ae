"""56 gated bf16 terms of [2, 256, 1152] on one thread."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bandwidth import Bandwidth, measure_bandwidth
from benchmarks.cases import FLAGSHIP
from benchmarks.forms import Prepared
from benchmarks.machine import threads
from benchmarks.providers import Provider
from benchmarks.rounds import benchmark_provider


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def one_thread_bandwidth(device: torch.device, one_thread: None) -> Bandwidth:
    return measure_bandwidth(device)


@pytest.fixture(scope="module")
def prepared(device: torch.device, one_thread: None) -> Prepared:
    return Prepared(FLAGSHIP, device)


@pytest.mark.parametrize("provider", Provider, ids=lambda provider: provider.value.replace(" ", "-"))
def test_flagship_one_thread(
    benchmark: BenchmarkFixture, prepared: Prepared, provider: Provider, one_thread_bandwidth: Bandwidth
) -> None:
    benchmark_provider(benchmark, prepared, provider, one_thread_bandwidth)
    benchmark.group = f"flagship, one thread: {FLAGSHIP.name}"
