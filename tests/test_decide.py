"""A policy that overrides `decide` is asked at every step, and what it answers is done or refused."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from equal_or_loud import StepCaching, assert_equal, equal_or_loud
from hosts import STEPS, inputs, run, small_dit
from naive_refresh import run_naively
from torch import Tensor

import fastcache
from fastcache.hosts import recognise
from fastcache.schedule import (
    COMPUTE,
    REUSE,
    Layout,
    Schedule,
    Selection,
    StepPlan,
    forecast,
    full_step,
    refresh,
    skip_step,
    uniform_step,
)

Answer = Callable[[Layout], StepPlan]


def reuse(layout: Layout) -> StepPlan:
    return uniform_step(layout, REUSE)


def refresh_mlp(layout: Layout) -> StepPlan:
    return StepPlan(
        layout, tuple(refresh(5) if branch.name == "mlp" else REUSE for branch in layout.branches)
    )


def forecast_line(layout: Layout) -> StepPlan:
    return uniform_step(layout, forecast(1))


def compute_attention(layout: Layout) -> StepPlan:
    return StepPlan(layout, tuple(COMPUTE if branch.name == "attn" else REUSE for branch in layout.branches))


@dataclass(frozen=True)
class Deciding(fastcache.Policy):
    """Plans full steps only, and decides on something else at the steps of `answers`."""

    answers: dict[int, Answer] = field(default_factory=dict)
    selection: Selection | None = None
    asked: list[int] = field(default_factory=list)

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        return Schedule(layout, (full_step(layout),) * num_steps, "Deciding", {}, self.selection)

    def decide(self, step: int, planned: StepPlan, signals: dict) -> StepPlan:
        self.asked.append(step)
        return self.answers[step](planned.layout) if step in self.answers else planned

    def decided(self, layout: Layout) -> Schedule:
        """The plan that the answers make, for the definition."""
        steps = (self.answers.get(step, full_step)(layout) for step in range(STEPS))
        return Schedule(layout, tuple(steps), "", {}, self.selection)


def played(policy: fastcache.Policy) -> list[Tensor]:
    model = small_dit()
    with fastcache.accelerate(model, policy, STEPS):
        return run(model)


def test_decide_is_asked_at_every_step_of_an_all_full_plan() -> None:
    policy = Deciding()
    played(policy)
    assert policy.asked == list(range(STEPS))


def test_decide_is_asked_at_every_step_of_every_generation() -> None:
    model, policy = small_dit(), Deciding()
    with fastcache.accelerate(model, policy, STEPS):
        run(model)
        run(model)
    assert policy.asked == list(range(STEPS)) * 2


def test_both_calls_of_a_step_follow_one_decision() -> None:
    class Alternating(Deciding):
        """Would answer something else each time that it is asked."""

        def decide(self, step: int, planned: StepPlan, signals: dict) -> StepPlan:
            self.asked.append(step)
            return reuse(planned.layout) if step > 0 and len(self.asked) % 2 == 0 else planned

    model, policy = small_dit(), Alternating()
    with fastcache.accelerate(model, policy, STEPS, calls_per_step=2) as session, torch.no_grad():
        for step in range(STEPS):
            for _ in range(2):
                model(*inputs(step))
    counts = {kind: summary.count for kind, summary in session.summary().steps.items()}
    assert policy.asked == list(range(STEPS)), policy.asked
    assert counts == {"full": 8, "reuse": 8}


def test_the_halves_of_a_found_step_follow_their_decision() -> None:
    model, policy = small_dit(), Deciding({2: reuse, 3: reuse})
    definition = StepCaching(model, set(range(STEPS)) - {2, 3})
    calls = [(step, call, inputs(step)[2] + 3 * call) for step in range(STEPS) for call in range(2)]
    expected = [definition(step, *inputs(step)[:2], y, call=call) for step, call, y in calls]
    with fastcache.accelerate(model, policy, STEPS), torch.no_grad():
        found = [model(*inputs(step)[:2], y) for step, _, y in calls]
    assert_equal(found, expected)


SELECTION = Selection("norm", 0.1)
ANSWERS = {
    "reuse": Deciding({1: reuse, 2: reuse, 5: reuse}),
    "mixed": Deciding({1: compute_attention, 2: reuse, 6: compute_attention}),
    "refresh": Deciding({1: refresh_mlp, 2: refresh_mlp, 5: refresh_mlp}, SELECTION),
    "refresh by attention": Deciding({1: refresh_mlp, 2: refresh_mlp}, Selection("attention", 0.1)),
    "skip": Deciding({1: skip_step, 2: skip_step, 5: skip_step}),
    "forecast": Deciding({2: forecast_line, 3: forecast_line, 6: forecast_line}),
    "skip, then reuse": Deciding({2: skip_step, 3: reuse}),
}


@pytest.mark.parametrize("policy", ANSWERS.values(), ids=ANSWERS)
def test_what_is_decided_over_an_all_full_plan_is_run(policy: Deciding) -> None:
    model = small_dit()
    expected = run_naively(model, policy.decided(recognise(model).layout()))
    assert_equal(played(policy), expected, 2e-5)


class OverReuse(Deciding):
    """Plans as FORA does: some steps reuse features already."""

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        planned = fastcache.FORA(interval=3).schedule(num_steps, layout)
        return Schedule(layout, planned.steps, "OverReuse", {}, self.selection)

    def decided(self, layout: Layout) -> Schedule:
        planned = self.schedule(STEPS, layout)
        steps = (
            self.answers[step](layout) if step in self.answers else planned.steps[step]
            for step in range(STEPS)
        )
        return Schedule(layout, tuple(steps), "", {}, self.selection)


OVER_REUSE = {
    "full": OverReuse({2: full_step, 5: full_step}),
    "refresh": OverReuse({2: refresh_mlp, 3: refresh_mlp, 5: refresh_mlp}, SELECTION),
    "refresh by attention": OverReuse({2: refresh_mlp, 3: refresh_mlp}, Selection("attention", 0.1)),
    "skip": OverReuse({2: skip_step, 5: skip_step}),
    "forecast": OverReuse({2: forecast_line, 5: forecast_line}),
}


@pytest.mark.parametrize("policy", OVER_REUSE.values(), ids=OVER_REUSE)
def test_what_is_decided_over_a_plan_that_reuses_is_run(policy: OverReuse) -> None:
    model = small_dit()
    expected = run_naively(model, policy.decided(recognise(model).layout()))
    assert_equal(played(policy), expected, 2e-5)


def test_a_refresh_that_nothing_says_how_to_choose_for_is_refused() -> None:
    with pytest.raises(fastcache.ScheduleError, match="selection"):
        played(OverReuse({2: refresh_mlp}))


def another_layout(layout: Layout) -> StepPlan:
    return full_step(recognise(small_dit(depth=2)).layout())


def nothing(layout: Layout) -> None:
    return None


@pytest.mark.parametrize("answer", [another_layout, nothing])
@pytest.mark.parametrize("kind", [Deciding, OverReuse])
def test_an_answer_that_is_no_plan_of_this_model_is_refused(kind: type[Deciding], answer: Answer) -> None:
    with pytest.raises(fastcache.FastCacheError, match="decide"):
        played(kind({2: answer}))


def test_a_first_step_that_is_decided_to_reuse_is_computed_and_counted() -> None:
    model = small_dit()
    policy = OverReuse({0: reuse})
    with fastcache.accelerate(model, policy, STEPS) as session:
        found = run(model)
    with torch.no_grad():
        expected = [model(*inputs(0))]
    assert_equal(found[:1], expected)
    assert session.summary().recomputed == 1


def test_an_instance_that_has_a_decide_of_its_own_is_asked() -> None:
    class Open(fastcache.FORA):
        """A policy that can be given attributes."""

        __setattr__ = object.__setattr__

    policy, asked = Open(interval=1), []
    policy.decide = lambda step, planned, signals: asked.append(step) or planned
    equal_or_loud(lambda: played(policy), run(small_dit()))
    assert asked == list(range(STEPS))
