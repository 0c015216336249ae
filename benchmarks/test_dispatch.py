"""What a call costs before it moves any bytes; a group is an autograd mode."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.dispatch import Mode, tiny_calls
from benchmarks.machine import threads


@pytest.mark.parametrize("call", tiny_calls(torch.device("cpu")))
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_dispatch(benchmark: BenchmarkFixture, device: torch.device, mode: Mode, call: str) -> None:
    benchmark.group = f"dispatch: {mode.value}"
    with threads(1), mode.context():
        benchmark(tiny_calls(device)[call])
