"""Bad indices on a GPU: nothing outside is touched, the result shows it, the flag names it, the session
raises.
"""

import pytest
import torch
from cases import FORMS, assert_same_bits
from hosts import small_dit
from on_device import available, build, each_kernel_backend

from fastcache import FORA, SessionError, accelerate
from fastcache.backends import take_index_errors


@each_kernel_backend
@pytest.mark.parametrize("bad", [3, 2**31 - 1, -2])
@pytest.mark.parametrize("form", ["packed-gates", "all"])
def test_a_gate_that_does_not_exist_is_nan(form: str, bad: int, backend: str, device: torch.device) -> None:
    call = build(FORMS[form], device)
    before = call.snapshot()
    call.arguments["gate_index"][1] = bad
    assert call.run(available(backend)).x.isnan().all()
    call.arguments["gate_index"].copy_(build(FORMS[form], device).arguments["gate_index"])
    assert all(torch.equal(bytes_, before[name]) for name, bytes_ in call.snapshot().items())
    assert take_index_errors(device) == "gate_index" and take_index_errors(device) == ""


@each_kernel_backend
@pytest.mark.parametrize("bad", [4, 2**31 - 1, -2])
@pytest.mark.parametrize(
    ("form", "name"),
    [("refresh", "fresh_slots"), ("float8-refresh", "fresh_slots"), ("packed-rows", "row_slots")],
)
def test_a_row_that_does_not_exist_is_left_out(
    form: str, name: str, bad: int, backend: str, device: torch.device
) -> None:
    call, kept = build(FORMS[form], device), build(FORMS[form], device)
    call.arguments[name][1, 2], kept.arguments[name][1, 2] = bad, -1
    assert_same_bits(call.run(available(backend)), kept.run(backend))
    if call.scatter:
        assert_same_bits(call.arguments["slot"], kept.arguments["slot"])
    assert take_index_errors(device) == "fresh_slots or row_slots"


@each_kernel_backend
def test_a_session_raises_when_it_closes(backend: str, device: torch.device) -> None:
    call = build(FORMS["packed-gates"], device)
    call.arguments["gate_index"][0] = 99
    with (
        pytest.raises(SessionError, match="^gate_index: a kernel on cuda:0 met an index out of range"),
        accelerate(small_dit().to(device), FORA(interval=2), num_steps=4),
    ):
        call.run(available(backend))
    assert take_index_errors(device) == ""
