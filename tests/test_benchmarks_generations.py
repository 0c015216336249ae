"""Whole generations, method by method: values, operators and floors. No test here asserts a speed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import WrongValues
from benchmarks.floors import floors_of, ridge_rows, stream_bytes, weight_bytes
from benchmarks.generations import (
    CPU,
    FORA_3,
    METHOD_WAYS,
    METHODS,
    TINY_MODEL,
    Contest,
    Entrant,
    Generation,
    Method,
    Samples,
    Way,
    alternating,
    checked,
    measure_generations,
)
from benchmarks.machine import Bandwidth, threads
from benchmarks.timing import Effort, Sample, Timing
from fastcache import FORA, SmoothCache
from fastcache.schedule import COMPUTE, REUSE, StepPlan, forecast, full_step, refresh, skip_step, uniform_step

EVERY = (FORA_3, *METHODS)
TIMING = Timing(1, 1, 1, 1, 1)


def burst(copy: float, read: float) -> Bandwidth:
    return Bandwidth(1, 1, copy, read, TIMING, TIMING)


def entrants(methods) -> list[Entrant]:
    return [Entrant(None, Way.HOST), *(Entrant(method, way) for method in methods for way in METHOD_WAYS)]


@pytest.fixture(autouse=True)
def quiet():
    with torch.inference_mode(), threads(1):
        yield


def test_every_method_computes_what_its_original_computes_in_fewer_operators() -> None:
    contest = Contest(TINY_MODEL, EVERY)
    operators, errors = checked(contest, entrants(EVERY))
    assert len(operators) == 1 + 3 * len(EVERY) and all(error < 1e-5 for error in errors.values())
    for method in EVERY:
        cheap = [k for k, kind in enumerate(contest.kinds(method)) if kind not in ("full", "skip")]
        counts = [sum(operators[Entrant(method, way)][k] for k in cheap) for way in METHOD_WAYS]
        assert counts[0] > counts[1] > counts[2], method.name


def test_a_method_that_computes_something_else_is_refused() -> None:
    other = SmoothCache(alternating(TINY_MODEL.steps))
    wrong = Method(
        "wrong", lambda steps: FORA(4), lambda model, policy, _: METHODS[3].original(model, other, _)
    )
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
    rows = measure_generations(Effort(0.0, 2, 2), (TINY_MODEL,), METHODS[:1], burst(10.0, 20.0))
    uncached, original, _, begun = rows
    assert uncached.speedup == uncached.cpu_speedup == 1.0 and uncached.kinds[0].kind == "full"
    schedule = Contest(TINY_MODEL, METHODS[:1]).schedules["ToCa"]
    speedup = uncached.typical_us / original.typical_us
    assert original.ideal == schedule.ideal_speedup() and original.quotient == pytest.approx(
        speedup / original.ideal
    )
    assert original.cpu_speedup == pytest.approx(uncached.cpu_us / original.cpu_us)
    assert uncached.generation.rounds == original.generation.rounds == 2
    assert {kind.kind: kind.steps for kind in original.kinds} == schedule.kinds()
    assert original.begin is None and begun.typical_us > begun.begin.median_us > 0
    assert uncached.kinds[0].floors.arithmetic == pytest.approx(uncached.kinds[0].timing.median_us / 1e3)


def test_a_disturbed_step_does_not_move_the_typical_generation() -> None:
    quiet, disturbed = [1.0, 2.0, 3.0], [1.0, 90.0, 3.0]
    timed = [[Sample(wall, wall / 2) for wall in walls] for walls in (quiet, disturbed, quiet)]
    samples = Samples([Generation([], steps, Sample(0.5, 0.25), []) for steps in timed])
    assert samples.typical == Sample(6.5, 3.25) and samples.generations[1].total.wall == 94.5
    assert samples.timing(["full", "partial", "partial"], "full") == Timing(1e6, 1e6, 1e6, 1e6, 3, 5e5)


def test_floors_are_those_counted_by_hand() -> None:
    layout = Contest(TINY_MODEL).layout  # 16 tokens of width 32, 2 blocks
    full, reuse = full_step(layout), uniform_step(layout, REUSE)
    attention, mlp, modulation = 4 * 32 * 32, 8 * 32 * 32, 6 * 32 * 32
    assert weight_bytes(full, modulated=True) == 4 * 2 * (attention + mlp + modulation)
    assert (
        weight_bytes(reuse, modulated=True) == 4 * 2 * modulation
        and weight_bytes(reuse, modulated=False) == 0
    )
    partial, empty = (StepPlan(layout, (REUSE, refresh(count)) * 2) for count in (4, 0))
    assert weight_bytes(partial, modulated=False) == 4 * 2 * mlp and weight_bytes(empty, modulated=False) == 0
    tensor = 4 * 2 * 16 * 32
    assert stream_bytes(reuse, 2) == (4 + 2) * tensor  # four features, x in and out
    assert stream_bytes(uniform_step(layout, forecast(2)), 2) == (12 + 2) * tensor
    assert stream_bytes(partial, 2) == int((2 * (1 + 1 + 3 / 4) + 2 * 3) * tensor)
    assert stream_bytes(skip_step(layout), 2) == 0
    assert stream_bytes(StepPlan(layout, (COMPUTE, REUSE) * 2), 2) == (2 * (2 + 1) + 2 * 3) * tensor
    floors = floors_of([full], 2, 8.0, burst(1.0, 1.0), modulated=False)
    assert floors.arithmetic == 8.0 and floors.stream == pytest.approx(1e-6 * stream_bytes(full, 2))
    assert ridge_rows(layout, 2, 1e3, 1.0) == pytest.approx(2 * full.flops(2) / 1e9)
    assert Contest(TINY_MODEL).device == CPU
