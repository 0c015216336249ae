"""Every contender of every case; a group is a case."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bandwidth import Bandwidth
from benchmarks.cases import Case, cases
from benchmarks.forms import NotMeasured, Prepared
from benchmarks.providers import Provider
from benchmarks.rounds import benchmark_provider


@pytest.fixture(scope="module", params=cases(), ids=lambda case: case.name)
def prepared(request: pytest.FixtureRequest, device: torch.device) -> Prepared:
    """The buffers of a case, shared by its contenders."""
    case: Case = request.param
    try:
        return Prepared(case, device)
    except NotMeasured as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("provider", Provider, ids=lambda provider: provider.value.replace(" ", "-"))
def test_form(
    benchmark: BenchmarkFixture, prepared: Prepared, provider: Provider, bandwidth: Bandwidth
) -> None:
    benchmark_provider(benchmark, prepared, provider, bandwidth)
