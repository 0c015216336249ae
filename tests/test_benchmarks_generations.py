"""Whole generations, method by method: values and operators. No test here asserts a speed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import WrongValues
from benchmarks.generations import (
    FORA_3,
    METHOD_WAYS,
    METHODS,
    TINY_MODEL,
    Contest,
    Entrant,
    Found,
    Generation,
    Method,
    Way,
    alternating,
    checked,
    measure_generations,
)
from benchmarks.machine import threads
from benchmarks.timing import Effort, Sample, Timing
from fastcache import FORA, SmoothCache

EVERY = (FORA_3, *METHODS)


def entrants(methods) -> list[Entrant]:
    return [Entrant(None, Way.HOST), *(Entrant(method, way) for method in methods for way in METHOD_WAYS)]


@pytest.fixture(autouse=True)
def quiet():
    with torch.inference_mode(), threads(1):
        yield


def test_every_method_computes_what_its_original_computes_in_fewer_operators() -> None:
    contest = Contest(TINY_MODEL, EVERY)
    found = checked(contest, entrants(EVERY))
    assert len(found) == 1 + 3 * len(EVERY)
    assert all(one.error is None or one.error < 1e-5 for one in found.values())
    for method in EVERY:
        costs = [found[Entrant(method, way)].costs for way in METHOD_WAYS]
        for kind in {*costs[0]} - {"full", "skip"}:
            original, ours, begun = (cost[kind]["operators"] for cost in costs)
            assert original > ours > begun, (method.name, kind)


def test_a_method_that_computes_something_else_is_refused() -> None:
    other = SmoothCache(alternating(TINY_MODEL.steps))
    original = lambda model, policy, schedule: METHODS[3].original(model, other, schedule)
    wrong = Method("wrong", lambda steps: FORA(4), original)
    with pytest.raises(WrongValues, match="Tiny DiT, wrong, fastcache: differs from the original"):
        checked(Contest(TINY_MODEL, (wrong,)), entrants((wrong,)))


def test_a_schedule_in_the_published_form_starts_and_ends_in_full() -> None:
    assert alternating(6) == {"attn": [1, 0, 0, 1, 0, 1], "mlp": [1, 0, 1, 0, 1, 1]}


def test_everyone_gives_the_model_back() -> None:
    contest = Contest(TINY_MODEL, EVERY)
    host, *others = entrants(EVERY)
    before = [*contest.generate(host).outputs]
    for entrant in (*others, Entrant(None, Way.COMPILED)):
        contest.generate(entrant)
        assert not any("forward" in block.__dict__ for block in contest.model.blocks), entrant.name
    assert all(map(torch.equal, contest.generate(host).outputs, before))


def test_rows_follow_from_the_medians_and_the_plan() -> None:
    rows = measure_generations(Effort(0.0, 2, 2), (TINY_MODEL,), METHODS[:1])
    uncached, original, _, begun = rows
    schedule = Contest(TINY_MODEL, METHODS[:1]).schedules["ToCa"]
    assert uncached["speedup"] == uncached["cpu_speedup"] == 1.0
    assert original["speedup"] == pytest.approx(uncached["typical_us"] / original["typical_us"])
    assert original["cpu_speedup"] == pytest.approx(uncached["cpu_us"] / original["cpu_us"])
    assert original["ideal"] == schedule.ideal_speedup()
    assert original["quotient"] == original["speedup"] / original["ideal"]
    assert uncached["generation"]["rounds"] == original["generation"]["rounds"] == 2
    assert {kind["kind"]: kind["steps"] for kind in original["kinds"]} == schedule.kinds()
    assert original["begin"] is None and begun["typical_us"] > begun["begin"]["median_us"] > 0
    [full] = uncached["kinds"]
    assert (full["kind"], full["of_uncached"], full["of_flops"]) == ("full", 1.0, 1.0)
    assert 0 < next(kind["of_flops"] for kind in original["kinds"] if kind["kind"] == "partial") < 1


def test_a_disturbed_step_does_not_move_the_typical_generation() -> None:
    quiet, disturbed = [1.0, 2.0, 3.0], [1.0, 90.0, 3.0]
    timed = [[Sample(wall, wall / 2) for wall in walls] for walls in (quiet, disturbed, quiet)]
    found = Found({}, generations=[Generation([], steps, Sample(0.5, 0.25), []) for steps in timed])
    assert found.typical() == Sample(6.5, 3.25)
    assert found.timing(["full", "partial", "partial"], "full") == Timing(1e6, 1e6, 1e6, 1e6, 3, 5e5)
