"""Names of calls, and t that stays on a device: what is told apart, read, and found at the close."""

import numpy as np
import pytest
import torch
from equal_or_loud import StepCaching, assert_equal
from hosts import CLASSES, STEPS, assert_close, inputs, reference, run, small_dit

import fastcache
from fastcache.engine.calls import Calls, Time, direction, first_return

POLICY = fastcache.FORA(interval=3)
FULL = POLICY.full_steps(STEPS)


# -- names -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_may_have_different_calls_where_calls_have_names() -> None:
    """A guidance interval: the unconditional half is called at steps 2 to 5 only."""
    model = small_dit()
    cond, uncond = [], {}
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        for step in range(STEPS):
            x, t, y = inputs(step)
            with session.call("cond"):
                cond.append(model(x, t, y))
            if 2 <= step < 6:
                with session.call("uncond"):
                    uncond[step] = model(x, t, torch.full_like(y, CLASSES))
    assert_close(cond, reference(model, FULL))
    definition = StepCaching(model, {2, 4})  # step 2 is planned as reuse, and nothing is stored: it computes
    none = torch.full((4,), CLASSES)
    assert_equal([*uncond.values()], [definition(step, *inputs(step)[:2], none) for step in uncond])
    assert session.summary().generations == 1


@torch.no_grad()
def test_a_name_that_comes_again_begins_the_next_step_whatever_t_is() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        for _ in range(STEPS):
            for name in ("a", "b", "c"):
                with session.call(name):
                    model(*inputs(0))
    assert session.summary().generations == 1


def test_a_bad_name_is_an_error() -> None:
    with fastcache.accelerate(small_dit(), POLICY, STEPS) as session:
        with pytest.raises(fastcache.SessionError, match="call: expected a name"):
            with session.call(""):
                pass


# -- t on a device -----------------------------------------------------------------------------------


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """t is as if it were on a GPU: its value is not on the host."""
    monkeypatch.setattr(Time, "of", staticmethod(lambda t: Time(device=t.detach(), version=t._version)))


def read(monkeypatch: pytest.MonkeyPatch) -> list:
    asked, equal = [], torch.equal
    monkeypatch.setattr("fastcache.engine.calls.torch.equal", lambda a, b: asked.append(1) or equal(a, b))
    return asked


@pytest.mark.parametrize("calls", [1, 2, 3])
@torch.no_grad()
def test_calls_are_found_in_the_first_generation_and_never_read_again(
    on_a_device: None, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    model, asked, counts = small_dit(), read(monkeypatch), []
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        for _ in range(3):
            for step in range(STEPS):
                for _ in range(calls):
                    model(*inputs(step))
            counts.append(len(asked))
    assert session.summary().generations == 3 and counts[0] <= calls and counts[1:] == counts[:1] * 2


@torch.no_grad()
def test_halves_that_share_one_t_are_found_without_reading(
    on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = small_dit(), read(monkeypatch)
    with fastcache.accelerate(model, POLICY, 3) as session:
        for step in range(3):
            x, t, y = inputs(step)
            model(x, t, y)
            model(x, t, y + 1)
    assert session.summary().generations == 1 and len(asked) <= 1  # the first t of step 1


def played_with_one_t(**options) -> list[torch.Tensor]:
    """A sampler that writes every t into the same tensor."""
    model, t, found = small_dit(), torch.zeros(4), []
    with fastcache.accelerate(model, POLICY, STEPS, **options), torch.no_grad():
        for step in range(STEPS):
            x, now, y = inputs(step)
            found.append(model(x, t.copy_(now), y))
    return found


def test_t_that_is_written_in_place_is_not_taken_for_the_one_before(on_a_device: None) -> None:
    with pytest.raises(fastcache.SessionError, match="t: the number of calls per step cannot be told"):
        played_with_one_t()
    assert_close(played_with_one_t(calls_per_step=1), reference(small_dit(), FULL))


@torch.no_grad()
def test_a_generation_that_was_interrupted_is_an_error_when_the_session_closes(on_a_device: None) -> None:
    model = small_dit()
    with pytest.raises(fastcache.SessionError, match="t went back from .* an earlier generation"):
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1):
            run(model, 4)
            run(model)
            run(model, 4)


@pytest.mark.parametrize(
    ("t", "value"),
    [
        (5, 5.0),
        (5.5, 5.5),
        (np.float32(5), 5.0),
        (np.array(5), 5.0),
        (np.array([5, 5]), 5.0),
        (torch.tensor(5), 5.0),
        (torch.tensor([[5.0], [5.0]]), 5.0),
        ([5, 6], (5.0, 6.0)),
        (torch.empty(0), None),
        (None, None),
        ("5s", None),
    ],
    ids=str,
)
def test_t_on_the_host_is_known_whatever_its_form(t, value) -> None:
    assert Time.of(t).host == value


# -- the rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "place"),
    [
        ([900.0, 800.0, 700.0, 600.0], None),
        ([0.1, 0.4, 0.9], None),
        ([900.0, 850.0, 870.0, 800.0, 820.0], None),  # a sampler of second order steps back by one
        ([900.0, 800.0, 700.0, 850.0], 3),
        ([0.0, 0.5, 0.8, 0.2], 3),
        ([5.0, 5.0, 5.0], None),
        ([900.0], None),
        ([], None),
    ],
)
def test_t_goes_back_where_a_generation_begins(times: list[float], place: int | None) -> None:
    assert first_return(times) == place


def test_direction_is_that_of_the_first_two_that_differ() -> None:
    assert direction([3.0, 3.0, 2.0, 9.0]) == -1 and direction([1.0, 2.0]) == 1 and direction([1.0]) == 0


def test_a_plan_that_is_too_short_says_so_at_the_first_call_beyond_it() -> None:
    calls = Calls(1)
    calls.plan(4)
    for t in (900.0, 800.0, 700.0, 600.0):
        calls.arrive(t, None)
        calls.leave()
    with pytest.raises(fastcache.SessionError, match="the plan has 4 steps, but after 4 of them .* 500"):
        calls.arrive(500.0, None)


def test_a_jump_within_a_step_goes_on_with_it() -> None:
    calls = Calls(None)
    calls.plan(8)
    places = []
    for _ in range(2):
        calls.jump(3)
        places.append(calls.arrive(5.0, None))
        calls.leave()
    assert [(place.step, place.call) for place in places] == [(3, 0), (3, 1)]
