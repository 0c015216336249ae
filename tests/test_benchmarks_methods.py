"""Whole generations, method by method: values, operators and floors. No test here asserts a speed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.correctness import WrongValues  # noqa: E402
from benchmarks.machine import threads  # noqa: E402
from benchmarks.method_floors import ridge_rows, step_floors, stream_bytes, weight_bytes  # noqa: E402
from benchmarks.method_report import method_sections  # noqa: E402
from benchmarks.methods import (
    METHODS,
    TINY_MODEL,
    UNCACHED,
    Contest,
    Generation,
    Method,
    Samples,
    Way,
    alternating,
    checked,
    measure_methods,
    with_floors,
)  # noqa: E402
from benchmarks.timing import Effort  # noqa: E402
from fastcache import FORA, SmoothCache, ToCa  # noqa: E402
from fastcache.schedule import COMPUTE, REUSE, StepPlan, forecast, full_step, refresh, skip_step, uniform_step  # noqa: E402


@pytest.fixture(autouse=True)
def quiet():
    with torch.inference_mode(), threads(1):
        yield


def test_every_method_computes_what_its_original_computes_in_fewer_operators() -> None:
    contest = Contest(TINY_MODEL)
    operators, errors = checked(contest)
    found = {
        (method and method.name, way): counts for (method, way), counts in zip(contest.entrants, operators)
    }
    assert len(found) == 1 + len(METHODS) * len(Way) and all(
        error is None or error < 1e-5 for error in errors
    )
    for method in METHODS:
        cheap = [k for k, kind in enumerate(contest.kinds(method)) if kind not in ("full", "skip")]
        original, ours, begun = (sum(found[method.name, way][k] for k in cheap) for way in Way)
        assert begun < ours < original, method.name


def test_a_method_that_computes_something_else_is_refused() -> None:
    wrong = Method(
        "wrong",
        lambda steps: FORA(interval=4),
        lambda model, policy, schedule: METHODS[3].original(
            model, SmoothCache(alternating(TINY_MODEL.steps)), schedule
        ),
    )
    with pytest.raises(WrongValues, match="Tiny DiT, wrong: fastcache differs from the original"):
        checked(Contest(TINY_MODEL, (wrong,)))


def test_a_schedule_in_the_published_form_starts_and_ends_in_full() -> None:
    assert alternating(6) == {"attn": [1, 0, 0, 1, 0, 1], "mlp": [1, 0, 1, 0, 1, 1]}


def test_everyone_gives_the_model_back() -> None:
    contest = Contest(TINY_MODEL)
    before = contest.generate(None, None).outputs
    for method, way in contest.entrants:
        contest.generate(method, way)
    assert torch.equal(contest.generate(None, None).outputs, before)


def test_rows_follow_from_the_medians_and_the_plan() -> None:
    rows = measure_methods(Effort(0.0, 2, 2), (TINY_MODEL,), METHODS[:1])
    uncached, original, *ours = rows
    assert (
        uncached.method == UNCACHED
        and uncached.speedup == pytest.approx(1.0)
        and [row.way for row in rows[1:]] == [way.value for way in Way]
    )
    schedule = ToCa(fresh_threshold=3).schedule(TINY_MODEL.steps, Contest(TINY_MODEL).layout)
    assert original.ideal == schedule.ideal_speedup() and original.quotient == pytest.approx(
        uncached.typical_us / original.typical_us / original.ideal
    )
    assert (
        uncached.generation.rounds == original.generation.rounds == 2
        and ours[-1].typical_us > ours[-1].begin.median_us
    )
    assert {kind.kind: kind.steps for kind in original.kinds} == schedule.kinds()
    assert original.begin is None and ours[-1].begin is not None
    found = with_floors(rows, 10.0, 20.0, (TINY_MODEL,), METHODS[:1])
    assert all(kind.floors is not None for row in found for kind in row.kinds)
    assert found[0].kinds[0].floors.arithmetic == pytest.approx(uncached.kinds[0].timing.median_us / 1e3)
    text = "\n".join(method_sections(found))
    assert "measured / ideal" in text and "limited by" in text and "waits for its weights" in text


def test_a_disturbed_step_does_not_move_the_typical_generation() -> None:
    samples, quiet = Samples(), [1.0, 2.0, 3.0]
    for seconds in (quiet, [1.0, 90.0, 3.0], quiet):
        samples.add(Generation(torch.empty(0), seconds, 0.5, []), ["full", "partial", "partial"])
    assert (
        samples.typical == 6.5
        and sorted(samples.generation) == [6.5, 6.5, 94.5]
        and samples.steps["full"] == [1.0, 1.0, 1.0]
    )


def test_floors_are_those_counted_by_hand() -> None:
    layout = Contest(TINY_MODEL).layout  # 16 tokens of width 32, 2 blocks
    full, reuse = full_step(layout), uniform_step(layout, REUSE)
    attention, mlp, modulation = 4 * 32 * 32, 8 * 32 * 32, 6 * 32 * 32
    assert weight_bytes(full, modulated=True) == 4 * 2 * (attention + mlp + modulation)
    assert (
        weight_bytes(reuse, modulated=True) == 4 * 2 * modulation
        and weight_bytes(reuse, modulated=False) == 0
    )
    partial = StepPlan(layout, (REUSE, refresh(4)) * 2)
    assert (
        weight_bytes(partial, modulated=False) == 4 * 2 * mlp
        and weight_bytes(StepPlan(layout, (REUSE, refresh(0)) * 2), modulated=False) == 0
    )
    tensor = 4 * 2 * 16 * 32
    assert stream_bytes(reuse, 2) == (4 + 2) * tensor  # four features, x in and out
    assert stream_bytes(uniform_step(layout, forecast(2)), 2) == (12 + 2) * tensor
    assert (
        stream_bytes(partial, 2) == int((2 * (1 + 1 + 3 / 4) + 2 * 3) * tensor)
        and stream_bytes(skip_step(layout), 2) == 0
    )
    assert stream_bytes(StepPlan(layout, (COMPUTE, REUSE) * 2), 2) == (2 * (2 + 1) + 2 * 3) * tensor
    floors = step_floors(full, 2, 8.0, 1.0, 1.0, modulated=False)
    assert (
        floors.arithmetic == 8.0
        and floors.limit == "arithmetic"
        and step_floors(reuse, 2, 0.0, 1e-6, 1.0, modulated=False).limit == "stream"
    )
    flops = full.flops(TINY_MODEL.batch)
    assert ridge_rows(TINY_MODEL, 1e3, 1.0) == pytest.approx(2 * flops / 1e9)
