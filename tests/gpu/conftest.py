"""Tests on a GPU: `pytest -m gpu tests/gpu`. Without one they are collected and skipped, each with the
reason.

FASTCACHE_GPU_TESTS_ON_CPU=1 runs the tests of values on a CPU, with cpp for cuda and eager for triton:
a rehearsal that checks the tests and no kernel.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

HERE = Path(__file__).parent
NO_GPU = (
    ""
    if torch.cuda.is_available()
    else "torch.cuda.is_available() is False: "
    + ("this PyTorch is a CPU build" if torch.version.cuda is None else "no GPU, or no driver")
)

REHEARSAL = bool(NO_GPU) and os.environ.get("FASTCACHE_GPU_TESTS_ON_CPU") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if NO_GPU and not (REHEARSAL and item.path.name in ("test_gpu_tokens.py", "test_gpu_values.py")):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture
def device() -> torch.device:
    """The GPU that tests run on."""
    return torch.device("cpu") if REHEARSAL else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu_alone(device: torch.device) -> None:
    """For tests that say nothing in a rehearsal."""
    if device.type != "cuda":
        pytest.skip("a rehearsal on a CPU: this test is about GPUs")


@pytest.fixture(autouse=True)
def no_index_errors(device: torch.device) -> Iterator[None]:
    """No test may leave a bad index behind that it did not ask for."""
    from fastcache.backends import take_index_errors

    yield
    assert take_index_errors(device) == ""
