"""A session that was made and never entered accelerates nothing: that is said."""

import contextlib
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
from equal_or_loud import POLICY
from hosts import STEPS, run, small_dit
from torch import nn

import fastcache

WARNINGS = (ResourceWarning, UserWarning)


def warned(use: Callable[[nn.Module], object]) -> list[str]:
    """Texts of the warnings that `use` of a model gives until what it made has died."""
    model = small_dit()
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = use(model)
        del kept
        gc.collect()
    return [str(each.message) for each in caught if issubclass(each.category, WARNINGS)]


def never_entered(model: nn.Module) -> object:
    session = fastcache.accelerate(model, POLICY, STEPS)
    run(model)
    return session


def thrown_away(model: nn.Module) -> None:
    fastcache.accelerate(model, POLICY, STEPS)
    run(model)


def begun_and_never_entered(model: nn.Module) -> object:
    session = fastcache.accelerate(model, POLICY, STEPS)
    session.begin(num_steps=5)
    return session


def asked_for_a_summary_and_never_entered(model: nn.Module) -> object:
    session = fastcache.accelerate(model, POLICY, STEPS)
    session.summary()
    return session


@pytest.mark.parametrize(
    "use", [never_entered, thrown_away, begun_and_never_entered, asked_for_a_summary_and_never_entered]
)
def test_a_session_that_dies_unused_warns_and_names_with(use: Callable) -> None:
    texts = warned(use)
    assert len(texts) == 1 and "with" in texts[0] and "accelerate" in texts[0], texts


def entered(model: nn.Module) -> object:
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
    return session


def entered_by_an_exit_stack(model: nn.Module) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastcache.accelerate(model, POLICY, STEPS))
        run(model)


def entered_and_never_called(model: nn.Module) -> None:
    with fastcache.accelerate(model, POLICY, STEPS):
        pass


def ended_by_an_exception(model: nn.Module) -> None:
    with contextlib.suppress(ZeroDivisionError), fastcache.accelerate(model, POLICY, STEPS):
        raise ZeroDivisionError


def refused(model: nn.Module) -> None:
    with pytest.raises(ValueError):
        fastcache.accelerate(model, POLICY, 0)
    with pytest.raises(fastcache.HostError):
        fastcache.accelerate(nn.Linear(1, 1), POLICY, STEPS)


@pytest.mark.parametrize(
    "use", [entered, entered_by_an_exit_stack, entered_and_never_called, ended_by_an_exception, refused]
)
def test_a_session_that_was_used_or_refused_dies_in_silence(
    use: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    assert warned(use) == [] and unraisable == []


def test_a_model_whose_session_was_never_entered_is_as_it_was() -> None:
    model = small_dit()
    expected = run(model)
    session = fastcache.accelerate(model, POLICY, STEPS)
    found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with session:
        run(model)
