"""A generation of 9 steps in every way; a group is a model."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.session import SESSION_SIZES, Run, Way, checked


@pytest.fixture(scope="module", params=SESSION_SIZES, ids=lambda size: size.name.replace(" ", "-"))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """A model whose ways were found to agree."""
    with torch.inference_mode():
        run = Run(request.param)
        checked(run)
        yield run


@pytest.mark.parametrize("way", Way, ids=lambda way: way.name.lower())
def test_session(benchmark: BenchmarkFixture, run: Run, way: Way) -> None:
    benchmark.group = f"session: {run.size.name}, {run.size.plan}"
    benchmark.pedantic(run.generate, args=(way,), rounds=5, warmup_rounds=1)
