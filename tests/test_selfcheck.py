"""A GPU backend proves itself before its first use: what the check finds, and where it must not run."""

import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastcache import backends
from fastcache.backends import eager, selfcheck
from fastcache.backends.library import OPERATORS
from fastcache.engine.record import OperatorCount

CPU = torch.device("cpu")


def broken(operator: str, output: int) -> types.SimpleNamespace:
    """The definition, but one output of one operator is off by one in one element ("": of none)."""

    def wrong(*args, **kwargs):
        outputs = list(getattr(eager, operator)(*args, **kwargs))
        if outputs[output].numel():
            outputs[output] = outputs[output].clone()
            outputs[output].view(-1)[7] += 1
        return tuple(outputs)

    return types.SimpleNamespace(
        **{name: getattr(eager, name) for name in OPERATORS} | ({operator: wrong} if operator else {})
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU as a device whose backends prove themselves first: `cuda` computes wrong values, `triton` right
    ones.
    """
    status = {name: backends.BackendStatus(name, True, "for this test") for name in backends.NAMES}
    modules = {"cuda": broken("residual_update", 0), "triton": broken("", 0), "eager": eager}
    monkeypatch.setattr(backends, "_STATUS", status)
    monkeypatch.setattr(backends, "_CHOICE", {})
    monkeypatch.setattr(backends, "_AGREED", {})
    monkeypatch.setitem(backends.ORDER, "cpu", ("cuda", "triton", "eager"))
    monkeypatch.setattr(backends, "_module", modules.__getitem__)
    return CPU


def test_the_definition_agrees_with_itself() -> None:
    assert {
        operator: selfcheck.disagreement(eager, CPU, operator) for operator in OPERATORS
    } == dict.fromkeys(OPERATORS, "")


@pytest.mark.parametrize(
    ("operator", "output", "case"),
    [
        ("residual_update", 0, "sum"),
        ("residual_update", 1, "modulate"),
        ("residual_update_scatter_", 0, "refresh"),
    ],
)
def test_one_wrong_element_of_any_operator_is_found_and_named(operator: str, output: int, case: str) -> None:
    assert selfcheck.disagreement(broken(operator, output), CPU, operator).startswith(f"{case}: ")


def test_a_backend_that_raises_disagrees_with_the_reason() -> None:
    def raises(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    assert (
        selfcheck.disagreement(types.SimpleNamespace(residual_update=raises), CPU, "residual_update")
        == "sum: no kernel image is available"
    )


def test_a_backend_that_is_wrong_is_passed_over_with_a_warning_and_the_next_one_runs(
    gpu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert backends.chosen_name(gpu) == "triton"
    (message,) = caplog.messages
    assert message.startswith(
        "backend cuda disagrees with eager on cpu and will not run residual_update: sum: "
    )


def test_nothing_is_checked_or_remembered_while_fake_tensors_stand_for_values(
    gpu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeTensorMode():
        backends.choose(gpu, torch.float32)
    assert not backends._AGREED and not caplog.messages
    assert backends.chosen_name(gpu) == "triton"


def test_nothing_is_checked_or_remembered_inside_a_trace(gpu: torch.device) -> None:
    make_fx(lambda x: (backends.choose(gpu, torch.float32), x + 1)[1])(torch.ones(2))
    assert not backends._AGREED


def test_nothing_is_checked_while_a_graph_is_captured(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backends.choose(gpu, torch.float32)
    assert not backends._AGREED
    with pytest.raises(
        RuntimeError, match="selfcheck: a backend cannot be checked inside a CUDA graph capture"
    ):
        selfcheck.disagreement(eager, gpu, "residual_update")


def test_the_operators_of_the_check_are_not_counted_as_the_callers(gpu: torch.device) -> None:
    with OperatorCount() as counter:
        backends.choose(gpu, torch.float32)
    assert backends._AGREED and counter.count == 0


@pytest.mark.parametrize(
    "state",
    [
        torch.inference_mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad,
    ],
    ids=["inference", "default-device", "autocast", "grad"],
)
def test_the_callers_modes_do_not_change_the_verdict(gpu: torch.device, state) -> None:
    with state():
        assert backends.choose(gpu, torch.float32) is backends._module("triton")
