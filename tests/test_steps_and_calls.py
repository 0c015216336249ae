"""Which step and which call of it a model call is: generations, restarts, guidance, announcements."""

from collections.abc import Callable, Iterable

import pytest
import torch
from equal_or_loud import FULL, POLICY, StepCaching, assert_equal, defined, equal_or_loud
from hosts import CLASSES, STEPS, inputs, reference, run, small_dit
from torch import Tensor, nn

import fastcache
from fastcache.models import DiT


class Stop(Exception):
    """What a user's callback raises to stop a sampler."""


def halves(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The inputs of a step's calls with guidance: the labels, and no label."""
    x, t, y = inputs(step)
    return [(x, t, y), (x, t, torch.full_like(y, CLASSES))]


def several(step: int, calls: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The inputs of a step's `calls` calls: labels differ, t does not."""
    x, t, y = inputs(step)
    return [(x, t, (y + 3 * call) % CLASSES) for call in range(calls)]


@torch.no_grad()
def guided(model: nn.Module, steps: Iterable[int] = range(STEPS)) -> list[Tensor]:
    """One generation of a sampler that calls the model twice a step."""
    return [model(*each) for step in steps for each in halves(step)]


def guided_definition(
    model: nn.Module, full: Iterable[int] = FULL, steps: Iterable[int] = range(STEPS)
) -> list[Tensor]:
    definition = StepCaching(model, set(full))
    return [definition(step, *each, call=call) for step in steps for call, each in enumerate(halves(step))]


def timesteps_of(steps: Iterable[int] = range(STEPS)) -> Tensor:
    """t of each step."""
    return torch.stack([inputs(step)[1][0] for step in steps])


# -- the number of calls that was found -------------------------------------------------------------------


def test_begin_forgets_the_number_of_calls_that_was_found() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        guided(model)
        session.begin()
        found = run(model)
    assert_equal(found, defined(model))
    assert session.summary().generations == 2


def test_begin_forgets_that_one_call_was_found() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
        session.begin()
        found = guided(model)
    assert_equal(found, guided_definition(model))
    assert session.summary().generations == 2


def test_begin_keeps_the_number_of_calls_that_was_declared() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=2) as session:
        guided(model)
        session.begin()
        found = guided(model)
    assert_equal(found, guided_definition(model))


def test_reset_forgets_the_number_of_calls_that_was_found() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        guided(model, range(2))
        session.reset()
        found = run(model)
    assert_equal(found, defined(model))


def test_a_call_that_fails_forgets_the_number_of_calls_that_was_found() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS):
        guided(model, range(2))
        with pytest.raises(IndexError), torch.no_grad():
            model(*inputs(2)[:2], torch.full((4,), 10**6))
        found = run(model)
    assert_equal(found, defined(model))


@pytest.mark.parametrize(
    ("first", "second"), [(guided, run), (run, guided)], ids=["guided first", "guided last"]
)
def test_guided_and_unguided_generations_follow_each_other_without_begin(
    first: Callable, second: Callable
) -> None:
    model = small_dit(depth=2)
    expected = {run: defined(model), guided: guided_definition(model)}

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS):
            return [*first(model), *second(model), *second(model)]

    equal_or_loud(play, [*expected[first], *expected[second], *expected[second]], fastcache.SessionError)


class LabelsFirst(DiT):
    """forward(x, y, t): the second argument is no timestep."""

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t, y)


class OtherNames(DiT):
    """Names its arguments as others do."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, class_labels)


CONVENTIONS = {
    "labels before t": (LabelsFirst, lambda model, x, t, y: model(x, y, t)),
    "labels before t, by name": (LabelsFirst, lambda model, x, t, y: model(x, y=y, t=t)),
    "other names": (OtherNames, lambda model, x, t, y: model(hidden_states=x, timestep=t, class_labels=y)),
    "other names in part": (OtherNames, lambda model, x, t, y: model(x, timestep=t, class_labels=y)),
    "x by name": (DiT, lambda model, x, t, y: model(x=x, t=t, y=y)),
}


@pytest.mark.parametrize(("kind", "call"), CONVENTIONS.values(), ids=CONVENTIONS)
def test_the_timestep_is_found_however_the_model_names_its_arguments(kind: type[DiT], call: Callable) -> None:
    model = small_dit(depth=2)
    expected = defined(model)
    model.__class__ = kind

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            return [call(model, *inputs(step)) for _ in range(2) for step in range(STEPS)]

    equal_or_loud(play, expected * 2)


def test_a_sampler_that_goes_around_the_accelerated_forward_is_told() -> None:
    model = small_dit(depth=2)
    forward = type(model).forward  # taken before, or by a wrapper that knows the class only

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            return [forward(model, *inputs(step)) for step in range(STEPS)]

    equal_or_loud(play, defined(model))


# -- any number of calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_any_number_of_calls_a_step_can_be_declared(calls: int) -> None:
    model = small_dit(depth=2)
    definition = StepCaching(model)
    expected = [
        definition(k, *each, call=call) for k in range(STEPS) for call, each in enumerate(several(k, calls))
    ]
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=calls) as session, torch.no_grad():
        found = [model(*each) for step in range(STEPS) for each in several(step, calls)]
    assert_equal(found, expected)
    assert session.summary().generations == 1


@pytest.mark.parametrize("bad", [0, -1, 1.0, 2.5, True, "2"])
def test_a_bad_number_of_calls_is_named(bad: object) -> None:
    with pytest.raises(ValueError, match="calls_per_step"):
        fastcache.accelerate(small_dit(depth=2), POLICY, STEPS, calls_per_step=bad)


CALLS = {
    "guidance in the first steps": (2, 2, 2, 2, 1, 1, 1, 1),
    "guidance in the last steps": (1, 1, 1, 1, 2, 2, 2, 2),
    "guidance in the middle": (1, 1, 2, 2, 2, 2, 1, 1),
    "three calls": (3,) * STEPS,
    "a third call in some steps": (3, 3, 3, 3, 2, 2, 2, 2),
}
GENERATIONS = (
    4  # of each pattern: then any 1 or 2 calls a step come out even, and no count is left over at the end
)


@pytest.mark.parametrize("pattern", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("declared", [None, 2], ids=["not declared", "2 declared"])
def test_calls_that_are_not_those_declared_or_found_are_never_counted_in_silence(
    pattern: tuple[int, ...], declared: int | None
) -> None:
    model = small_dit(depth=2)
    definition = StepCaching(model)
    steps = [several(step, calls) for step, calls in enumerate(pattern)]
    # a call that was not made at the last full step has no feature of its own: it is computed
    once = [
        definition(step, *each, call=call)
        for step, calls in enumerate(steps)
        for call, each in enumerate(calls)
    ]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=declared), torch.no_grad():
            return [model(*each) for _ in range(GENERATIONS) for calls in steps for each in calls]

    equal_or_loud(play, once * GENERATIONS, fastcache.SessionError)


# -- steps that the sampler names -------------------------------------------------------------------------


def test_the_first_step_that_is_named_keeps_its_number_with_two_calls() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        session.step(5)
        found = guided(model, range(5, STEPS))
    assert_equal(found, guided_definition(model, {5, 7}, range(5, STEPS)))


def test_a_step_that_is_named_before_each_of_its_two_calls_keeps_their_features_apart() -> None:
    model = small_dit(depth=2)

    def play() -> list[Tensor]:
        found = []
        with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
            for step in range(STEPS):
                for each in halves(step):
                    session.step(step)
                    found.append(model(*each))
            session.reset()
        return found

    equal_or_loud(play, guided_definition(model), fastcache.SessionError)


def test_a_step_that_is_named_before_its_two_calls_keeps_their_features_apart() -> None:
    model = small_dit(depth=2)
    found = []
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        for step in range(STEPS):
            session.step(step)
            found += [model(*each) for each in halves(step)]
    assert_equal(found, guided_definition(model))


@pytest.mark.parametrize("back", [2, 3])
def test_taylorseer_follows_a_sampler_that_goes_back_or_says_that_it_cannot(back: int) -> None:
    model, policy = small_dit(depth=2), fastcache.TaylorSeer(interval=3, max_order=2)
    with torch.no_grad():
        in_full = model(*inputs(back))
    try:
        with fastcache.accelerate(model, policy, STEPS, calls_per_step=1) as session, torch.no_grad():
            forecast = [model(*inputs(step)) for step in range(6)][back]
            session.step(back)
            found = model(*inputs(back))
            session.reset()
    except fastcache.SessionError:
        return
    # what was computed later is no past: either the same features as at the first time, or all are computed
    assert_equal([found], [in_full if torch.allclose(found, in_full, rtol=1e-3, atol=1e-4) else forecast])


def test_taylorseer_follows_a_sampler_that_repeats_a_full_step_or_says_that_it_cannot() -> None:
    model, policy = small_dit(depth=2), fastcache.TaylorSeer(interval=3, max_order=2)
    with fastcache.accelerate(model, policy, STEPS):
        expected = run(model)[:6]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, policy, STEPS, calls_per_step=1) as session, torch.no_grad():
            found = {}
            for step in [0, 1, 2, 3, 4, 4, 5]:  # 4 is full
                session.step(step)
                found[step] = model(*inputs(step))
            session.reset()
        return list(found.values())

    equal_or_loud(play, expected, fastcache.SessionError)


# -- generations that were stopped -------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4, 7])
@pytest.mark.parametrize("declared", [None, 1], ids=["found", "declared"])
def test_a_generation_after_one_that_was_stopped_starts_at_step_zero(stop: int, declared: int | None) -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=declared):
        with pytest.raises(Stop):
            run(model, stop)
            raise Stop
        found = run(model)
    assert_equal(found, defined(model))


@pytest.mark.parametrize("declared", [None, 1], ids=["found", "declared"])
def test_a_generation_after_one_that_was_stopped_at_its_first_step_is_recognised_or_refused(
    declared: int | None,
) -> None:
    model = small_dit(
        depth=2
    )  # t stays what it is: this may be a restart, a second half or another evaluation

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=declared):
            run(model, 1)
            return run(model)

    equal_or_loud(play, defined(model), fastcache.SessionError)


@pytest.mark.parametrize("calls", [5, 6], ids=["between the halves of a step", "between steps"])
@pytest.mark.parametrize("declared", [None, 2], ids=["found", "declared"])
def test_a_guided_generation_after_one_that_was_stopped_starts_at_step_zero(
    calls: int, declared: int | None
) -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=declared), torch.no_grad():
        for each in [each for step in range(STEPS) for each in halves(step)][:calls]:
            model(*each)
        found = guided(model)
    assert_equal(found, guided_definition(model))


def test_two_halves_of_generations_are_not_one() -> None:
    model = small_dit(depth=2)
    once = defined(model)[:4]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS):
            return [*run(model, 4), *run(model, 4)]

    equal_or_loud(play, [*once, *once], fastcache.SessionError)


def test_a_generation_that_starts_elsewhere_after_one_that_was_stopped_is_recognised_or_refused() -> None:
    model = small_dit(depth=2)
    later = [(x, t - 50, y) for x, t, y in (inputs(step) for step in range(STEPS))]
    definition = StepCaching(model)
    expected = [definition(step, *each) for step, each in enumerate(later)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            run(model, 4)
            found = [model(*each) for each in later]
            run(model, 4)  # so many calls are two generations
        return found

    equal_or_loud(play, expected, fastcache.SessionError)


def test_a_sampler_that_evaluates_a_timestep_twice_is_not_taken_for_a_restart() -> None:
    model = small_dit(depth=2)
    order = [0, 1, 1, 2, 2, 3, 3, 4]  # Heun's
    definition = StepCaching(model)
    expected = [definition(step, *inputs(at)) for step, at in enumerate(order)]
    with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
        found = [model(*inputs(at)) for at in order]
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3, 4]], ids=["before", "first"]
)
def test_a_sampler_that_goes_back_within_a_generation_is_followed_or_refused(order: list[int]) -> None:
    model = small_dit(depth=2)  # as Restart and RePaint do: t goes up again, and that is the plan
    definition = StepCaching(model)
    expected = [definition(step, *inputs(at)) for step, at in enumerate(order)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            return [model(*inputs(at)) for at in order]

    equal_or_loud(play, expected, fastcache.SessionError)


def test_a_generation_with_one_timestep_for_all_steps_is_no_restart_at_each_step() -> None:
    model = small_dit(depth=2)
    x, t, y = inputs(0)
    definition = StepCaching(model)
    expected = [definition(step, x + step, t, y) for step in range(STEPS)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1), torch.no_grad():
            return [model(x + step, t, y) for step in range(STEPS)]

    equal_or_loud(play, expected, fastcache.SessionError)


# -- what was announced ------------------------------------------------------------------------------------


def announced(
    model: nn.Module, timesteps: Tensor, labels: Tensor, called: list[tuple[Tensor, ...]]
) -> list[Tensor]:
    """Outputs of the calls of a session that was told `timesteps` and `labels`."""
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session, torch.no_grad():
        session.begin(timesteps=timesteps, conditions={"y": labels})
        return [model(*each) for each in called]


def wrong_from_step_one(right: Tensor) -> Tensor:
    return torch.cat([right[:1], right[1:].flip(0)])


def wrong_at_a_reuse_step(right: Tensor) -> Tensor:
    return torch.cat([right[:2], right[2:3] - 300, right[3:]])


def wrong_at_the_last_step(right: Tensor) -> Tensor:
    return torch.cat([right[:-1], right[-1:] - 100])


def shifted_by_one_step(right: Tensor) -> Tensor:
    return torch.cat([right[:1], right[:-1]])


def off_by_a_little(right: Tensor) -> Tensor:
    return right - 3


@pytest.mark.parametrize(
    "change",
    [
        wrong_from_step_one,
        wrong_at_a_reuse_step,
        wrong_at_the_last_step,
        shifted_by_one_step,
        off_by_a_little,
    ],
)
def test_timesteps_that_are_wrong_at_any_step_are_an_error(change: Callable[[Tensor], Tensor]) -> None:
    model = small_dit(depth=2)
    with pytest.raises(fastcache.SessionError, match="timesteps"):
        announced(model, change(timesteps_of()), inputs(0)[2], [inputs(step) for step in range(STEPS)])


def test_timesteps_that_are_wrong_are_an_error_where_the_first_call_is_a_later_step() -> None:
    model = small_dit(depth=2)
    with pytest.raises(fastcache.SessionError, match="timesteps"):
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session, torch.no_grad():
            session.begin(timesteps=timesteps_of().flip(0), conditions={"y": inputs(0)[2]})
            session.step(1)
            for step in range(1, STEPS):
                model(*inputs(step))


def test_labels_that_change_within_an_announced_generation_are_an_error() -> None:
    model = small_dit(depth=2)
    called = [
        inputs(step) if step < 4 else (*inputs(step)[:2], inputs(step)[2].flip(0)) for step in range(STEPS)
    ]
    with pytest.raises(fastcache.SessionError, match="conditions"):
        announced(model, timesteps_of(), inputs(0)[2], called)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_another_batch_than_announced_gives_the_definition_or_an_error(batch: int) -> None:
    model = small_dit(depth=2)
    called = [inputs(step, batch) for step in range(STEPS)]
    equal_or_loud(
        lambda: announced(model, timesteps_of(), inputs(0)[2], called),
        reference(model, FULL, batch=batch),
        fastcache.SessionError,
    )


def test_a_batch_that_changes_within_an_announced_generation_gives_the_definition_or_an_error() -> None:
    model = small_dit(depth=2)
    called = [inputs(step, 4 if step < 4 else 2) for step in range(STEPS)]
    first, second = StepCaching(model), StepCaching(model)
    expected = [(first if step < 4 else second)(step, *each) for step, each in enumerate(called)]
    equal_or_loud(
        lambda: announced(model, timesteps_of(), inputs(0)[2], called), expected, fastcache.SessionError
    )


def test_a_wrong_announcement_does_not_hide_the_users_own_exception() -> None:
    model = small_dit(depth=2)
    with pytest.raises(Stop):
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session:
            session.begin(timesteps=timesteps_of(), conditions={"y": (inputs(0)[2] + 1) % CLASSES})
            run(model)
            raise Stop


def test_a_wrong_announcement_is_an_error_when_a_later_generation_was_right() -> None:
    model = small_dit(depth=2)
    with pytest.raises(fastcache.SessionError, match="timesteps"):
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session:
            session.begin(timesteps=wrong_from_step_one(timesteps_of()), conditions={"y": inputs(0)[2]})
            run(model)
            session.begin(timesteps=timesteps_of(), conditions={"y": inputs(0)[2]})
            run(model)


@pytest.mark.parametrize("where", ["announced within", "announced before"])
def test_a_right_announcement_is_accepted_under_autocast(where: str) -> None:
    model = small_dit(depth=2)
    timesteps, labels = timesteps_of(), inputs(0)[2]
    autocast = torch.autocast("cpu", torch.bfloat16)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        if where == "announced before":
            session.begin(timesteps=timesteps, conditions={"y": labels})
        with autocast:
            if where == "announced within":
                session.begin(timesteps=timesteps, conditions={"y": labels})
            found = run(model)
    assert_equal(found, reference(model, FULL), 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_right_announcement_is_accepted_in_half_precision(dtype: torch.dtype) -> None:
    model = small_dit(depth=2, dtype=dtype)
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        session.begin(timesteps=timesteps_of(), conditions={"y": inputs(0)[2]})
        found = [model(*inputs(step, dtype=dtype)) for step in range(STEPS)]
    assert_equal(found, reference(small_dit(depth=2), FULL), 0.2)


def test_an_announcement_for_a_host_that_makes_a_condition_for_each_block_is_refused() -> None:
    class Fading(type(small_dit(depth=2))):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            c = self.t_embedder(t) + self.y_embedder(y)
            x = self.x_embedder(x) + self.pos_embed
            for block in self.blocks:
                x, c = block(x, c), 0.5 * c
            return self._unpatch(self.final_layer(x, c))

    model = small_dit(depth=2)
    model.__class__ = Fading
    called = [inputs(step) for step in range(STEPS)]
    equal_or_loud(
        lambda: announced(model, timesteps_of(), inputs(0)[2], called),
        defined(model),
        fastcache.FastCacheError,
    )


def test_an_announced_generation_that_was_stopped_does_not_lend_its_modulations() -> None:
    model = small_dit(depth=2)
    other = [(x, t, y.flip(0)) for x, t, y in (inputs(step) for step in range(STEPS))]
    definition = StepCaching(model)
    expected = [definition(step, *each) for step, each in enumerate(other)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session, torch.no_grad():
            session.begin(timesteps=timesteps_of(), conditions={"y": inputs(0)[2]})
            run(model, 3)
            found = [model(*each) for each in other]
            run(model, 5)
        return found

    equal_or_loud(play, expected, fastcache.SessionError)
