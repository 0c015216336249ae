"""Generations of whole models under pytest-benchmark; a group is a method on a model."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.methods import METHODS, MODEL_SIZES, Contest, Method, Way, checked


@pytest.fixture(scope="module", params=MODEL_SIZES, ids=lambda size: size.name.replace(" ", "-"))
def contest(request: pytest.FixtureRequest) -> Iterator[Contest]:
    """A model on which all methods were found to agree with their originals."""
    with torch.inference_mode():
        contest = Contest(request.param)
        checked(contest)
        yield contest


@pytest.mark.parametrize("way", Way, ids=lambda way: way.name.lower())
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_method(benchmark: BenchmarkFixture, contest: Contest, method: Method, way: Way) -> None:
    benchmark.group = f"{method.name} on {contest.size.name}"
    benchmark.pedantic(contest.generate, args=(method, way), rounds=3)


def test_uncached(benchmark: BenchmarkFixture, contest: Contest) -> None:
    benchmark.group = f"uncached on {contest.size.name}"
    benchmark.pedantic(contest.generate, args=(None, None), rounds=3)
