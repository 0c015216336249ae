"""Bad indices are reported by the session whose kernels met them, wherever its model's weights are."""

from collections.abc import Iterator

import pytest
import torch
from equal_or_loud import POLICY
from hosts import STEPS, run, small_dit
from torch import Tensor

import fastcache
from fastcache.backends import index_errors, index_flags

CPU = torch.device("cpu")


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """The sticky flag of a device on which kernels have run: here the CPU."""
    monkeypatch.setattr(index_errors, "FLAGS", {})
    monkeypatch.setattr(index_flags, "FLAGS", index_errors.FLAGS)
    yield index_flags.error_flag(CPU)
    index_errors.take_index_errors(CPU)


def test_a_session_raises_for_a_bad_index_of_its_own(flag: Tensor) -> None:
    model = small_dit(depth=1)
    with pytest.raises(fastcache.SessionError, match="gate_index"):
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model)
            flag.fill_(1)


def test_a_session_leaves_a_bad_index_to_the_session_that_met_it(flag: Tensor) -> None:
    first, second = small_dit(depth=1), small_dit(depth=1)
    with pytest.raises(fastcache.SessionError, match="gate_index"):
        with fastcache.accelerate(first, POLICY, STEPS):
            run(first)
            flag.fill_(1)
            try:
                with fastcache.accelerate(second, POLICY, STEPS):
                    run(second)
            except fastcache.SessionError:
                pytest.fail("the inner session took the outer one's bad index")


def test_a_session_does_not_raise_for_a_bad_index_from_before_it_was_entered(flag: Tensor) -> None:
    flag.fill_(1)
    model = small_dit(depth=1)
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model)


def test_the_device_that_an_offloaded_model_runs_on_is_asked(flag: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small_dit(depth=1)
    accelerate.cpu_offload(model, execution_device=CPU)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(fastcache.SessionError, match="gate_index"):
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model)
            flag.fill_(1)
