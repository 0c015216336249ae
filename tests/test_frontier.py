"""The frontier: a tiny one end to end, its resumption, and what its report says of fronts and orders."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiers import thinned

pytest.importorskip("typer")
pytest.importorskip("diffusers")

from typer.testing import CliRunner

import fastcache.workshop.studies.frontier.measuring as measuring
from fastcache.cli.app import app
from fastcache.policies import FORA, TaylorSeer
from fastcache.workshop.sampling import Samples
from fastcache.workshop.studies.comparison import Sampler
from fastcache.workshop.studies.frontier.front import (
    FRECHET,
    PSNR,
    frechet_difference_error,
    fronts,
    order_checks,
    pareto_front,
)
from fastcache.workshop.studies.frontier.grid import DEFAULT_GRID, UNCACHED, FrontierSetting, chosen
from fastcache.workshop.studies.frontier.judging import Judge
from fastcache.workshop.studies.frontier.measuring import compared_batches
from fastcache.workshop.studies.frontier.plan import TINY, FrontierOptions, plan_frontier
from fastcache.workshop.studies.frontier.report import order_lines
from fastcache.workshop.studies.frontier.results import FrontierRow, Store, fingerprint_of
from fastcache.workshop.studies.frontier.run import run_frontier

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = FrontierOptions(
    grid=(
        UNCACHED,
        FrontierSetting("FORA 2", "FORA", FORA(interval=2), 2, usual=True),
        FrontierSetting("TaylorSeer 2", "TaylorSeer", TaylorSeer(interval=2), 2, usual=True),
    ),
    sampler=Sampler(steps=5, batch_size=2),
    pictures=4,
    comparisons=1,
)


class Killed(BaseException):
    """As a signal would end a run."""


@pytest.fixture(scope="module", autouse=True)
def judge() -> Judge:
    """One for the whole file: the real pictures take a second to draw."""
    found = Judge(SMALL.pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcache.workshop.studies.frontier.run.Judge", lambda pictures: found)
        yield found


@pytest.fixture(autouse=True)
def plot(request, monkeypatch) -> None:
    """No plots but where one is looked at: they take longer than the rest."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(
            "fastcache.workshop.studies.frontier.drawing.draw_frontier", lambda report, path: path.touch()
        )


@pytest.fixture
def sampled(monkeypatch) -> list[tuple[object, int]]:
    """(policy, first picture) of every batch that is sampled for a measurement."""
    batches: list[tuple[object, int]] = []
    original = Sampler.run

    def run(self, model, indices, policy, **options) -> Samples:
        if self.steps == SMALL.sampler.steps and len(indices) == self.batch_size:
            batches.append((policy, indices[0]))
        return original(self, model, indices, policy, **options)

    monkeypatch.setattr(measuring.Sampler, "run", run)
    return batches


def measured(out: Path, options: FrontierOptions = SMALL, only: tuple[str, ...] = ()):
    plan = plan_frontier(out, options, only=only)
    return run_frontier(plan, out)


def row(
    setting: str,
    method: str,
    *,
    interval: int | None = 3,
    frechet: float = 1.0,
    psnr: float | None = 30.0,
    speedup: float = 2.0,
    accuracy: float = 1.0,
    usual: bool = True,
) -> FrontierRow:
    return FrontierRow(
        setting,
        method,
        interval,
        usual,
        {},
        8,
        frechet,
        accuracy,
        psnr,
        0.1,
        0.1 * speedup,
        speedup,
        speedup,
        speedup,
        1.0,
        [0.1],
        [0.1 * speedup],
        {"full": 3},
        0,
    )


def four(**goodness: tuple[float, float]) -> list[FrontierRow]:
    """A usual row of each method at interval 3, by (Frechet distance, PSNR)."""
    return [
        row(f"{method} 3", method, frechet=frechet, psnr=psnr) for method, (frechet, psnr) in goodness.items()
    ]


# -- end to end -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tiny_frontier_writes_json_csv_markdown_and_plot(tmp_path):
    result = CliRunner().invoke(app, ["frontier", "--tiny", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "minutes left" in result.output and "new" in result.output
    report = json.loads((tmp_path / "frontier.json").read_text())
    assert [entry["setting"] for entry in report["rows"]] == [
        setting.name for setting in TINY.grid
    ] and report["missing"] == []
    for entry in report["rows"][1:]:
        assert entry["speedup"] == pytest.approx(
            entry["uncached_seconds_per_picture"] / entry["seconds_per_picture"]
        )
        assert entry["quotient"] == pytest.approx(entry["speedup"] / entry["ideal_speedup"])
        assert len(entry["batch_seconds"]) == len(entry["uncached_batch_seconds"]) == TINY.comparisons
        assert entry["psnr_db"] > 10 and entry["frechet_distance"] > 0 and entry["ideal_speedup"] > 1.2
    smooth = report["rows"][-1]["policy"]
    assert smooth["target_speedup"] == 1.5 and smooth["threshold"] > 0
    with (tmp_path / "frontier.csv").open() as file:
        assert [line["setting"] for line in csv.DictReader(file)] == [setting.name for setting in TINY.grid]
    text = (tmp_path / "frontier.md").read_text()
    assert "| FORA 2 |" in text and "No L2C router was trained" in text and "Pareto" in text
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_only_measures_what_is_named_and_says_what_is_missing(tmp_path):
    report = measured(tmp_path, only=("taylorseer",))
    assert [entry.setting for entry in report.rows] == ["uncached", "TaylorSeer 2"] and report.missing == [
        "FORA 2"
    ]
    assert "Not measured yet: FORA 2" in (tmp_path / "frontier.md").read_text()
    result = CliRunner().invoke(app, ["frontier", "--tiny", "--only", "nothing", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--only: expected names or patterns of uncached" in " ".join(
        result.output.replace("│", " ").split()
    )


def test_patterns_choose_by_method_name_or_file_name():
    names = lambda *only: [setting.name for setting in chosen(DEFAULT_GRID, only)]
    assert names("FORA") == ["uncached", "FORA 2", "FORA 3", "FORA 5"]
    assert names("toca 3*", "duca-5-attention") == [
        "uncached",
        "ToCa 3 attention",
        "ToCa 3 kv-norm",
        "ToCa 3 random",
        "ToCa 3 constant 0.25",
        "DuCa 5 attention",
    ]
    assert names() == [setting.name for setting in DEFAULT_GRID]


def test_every_setting_of_the_default_grid_has_a_file_of_its_own():
    assert len({setting.slug for setting in DEFAULT_GRID}) == len(DEFAULT_GRID)
    usual = [
        (setting.method, setting.interval)
        for setting in DEFAULT_GRID
        if setting.usual and setting.interval is not None
    ]
    assert len(set(usual)) == len(usual)
    for interval in (3, 5):
        assert {method for method, n in usual if n == interval} == {"FORA", "ToCa", "DuCa", "TaylorSeer"}


# -- resuming ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch, sampled):
    original = measuring.Sampler.run

    def killing(self, model, indices, policy, **options) -> Samples:
        if isinstance(policy, TaylorSeer) and indices[0] > 0:
            raise Killed
        return original(self, model, indices, policy, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(measuring.Sampler, "run", killing)
        measured(tmp_path)
    before = (tmp_path / "results" / "fora-2.json").read_bytes()
    assert json.loads((tmp_path / "frontier.json").read_text())["missing"] == ["TaylorSeer 2"]
    sampled.clear()
    report = measured(tmp_path)
    assert [entry.setting for entry in report.rows] == ["uncached", "FORA 2", "TaylorSeer 2"]
    assert (tmp_path / "results" / "fora-2.json").read_bytes() == before
    assert not any(isinstance(policy, FORA) for policy, _ in sampled)
    assert [first for policy, first in sampled if isinstance(policy, TaylorSeer)] == [0, 2]
    assert not list(tmp_path.rglob("partial-*"))


@pytest.mark.slow
def test_a_finished_run_samples_nothing_again_and_reports_the_same(tmp_path, sampled):
    first = measured(tmp_path)
    sampled.clear()
    assert measured(tmp_path) == first and sampled == []


@pytest.mark.full
def test_a_changed_setting_is_measured_again_and_the_others_are_not(tmp_path, sampled):
    measured(tmp_path)
    changed = replace(
        SMALL,
        grid=(
            *SMALL.grid[:2],
            FrontierSetting("TaylorSeer 2", "TaylorSeer", TaylorSeer(interval=2, max_order=1), 2, usual=True),
        ),
    )
    assert [planned.state for planned in plan_frontier(tmp_path, changed).grid] == ["there", "there", "stale"]
    sampled.clear()
    report = measured(tmp_path, changed)
    assert report.rows[2].policy["max_order"] == 1
    assert {type(policy).__name__ for policy, _ in sampled} == {"TaylorSeer", "NoneType"}


@pytest.mark.parametrize(
    "change",
    thinned(
        [{"pictures": 6}, {"sampler": replace(SMALL.sampler, seed=1)}, {"comparisons": 2}], [{"pictures": 6}]
    ),
)
@pytest.mark.slow
def test_results_of_other_options_are_stale(tmp_path, change):
    measured(tmp_path, only=("uncached",))
    assert plan_frontier(tmp_path, replace(SMALL, **change)).grid[0].state == "stale"


@pytest.mark.full
def test_results_of_another_version_are_stale(tmp_path, monkeypatch):
    measured(tmp_path, only=("uncached",))
    monkeypatch.setattr("fastcache.workshop.environment.__version__", "0.0.0")
    plan = plan_frontier(tmp_path, SMALL)
    assert plan.grid[0].state == "stale" and plan.seconds > 0


def test_a_result_without_its_record_is_not_finished(tmp_path):
    store = Store(tmp_path)
    store.write("a", fingerprint_of(x=1), row("a", "FORA"), {"features": np.zeros((2, 3))})
    assert (
        store.row("a", fingerprint_of(x=1)) == row("a", "FORA")
        and store.row("a", fingerprint_of(x=2)) is None
    )
    (tmp_path / "a.json").unlink()
    assert store.row("a", fingerprint_of(x=1)) is None and not store.stale("a", fingerprint_of(x=1))


# -- times ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_uncached_batches_come_directly_before_the_same_batch_of_the_setting(tmp_path, sampled):
    measured(tmp_path, replace(SMALL, pictures=10, comparisons=2), only=("fora",))
    fora = FORA(interval=2)
    uncached = [(None, first) for first in range(0, 10, 2)]
    assert sampled == [*uncached, (fora, 0), (fora, 2), (None, 4), (fora, 4), (fora, 6), (None, 8), (fora, 8)]


@pytest.mark.parametrize(("batches", "comparisons"), [(1, 1), (1, 5), (2, 2), (7, 3), (56, 5), (3, 10)])
def test_compared_batches_are_spread_and_end_with_the_last(batches, comparisons):
    found = compared_batches(batches, comparisons)
    assert max(found) == batches - 1 and min(found) >= 0 and 1 <= len(found) <= min(batches, comparisons)
    if comparisons < batches:
        assert 0 not in found and len(found) == comparisons


# -- fronts and orders ------------------------------------------------------------------------------


def test_the_pareto_front_is_what_nothing_beats_in_both():
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 7.0), (1.5, 6.0), (4.0, 1.0), (5.0, float("nan"))]
    assert pareto_front(points) == [0, 3, 5]
    assert pareto_front([]) == [] and pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0]


def test_no_point_of_the_front_is_beaten_and_every_other_one_is():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [tuple(point) for point in rng.integers(0, 6, (12, 2)).astype(float)]
        front = pareto_front(points)
        beaten = lambda p: any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)
        assert {points[index] for index in front} == {point for point in points if not beaten(point)}
        assert [points[index][0] for index in front] == sorted({points[index][0] for index in front})


def test_fronts_take_lower_frechet_distances_for_better():
    found = fronts(
        [
            row("uncached", "uncached", psnr=None, frechet=0.5, speedup=1),
            row("good", "FORA", frechet=0.6, psnr=40),
            row("bad", "ToCa", frechet=0.9, psnr=30),
        ]
    )
    assert found["measured"]["frechet_distance"] == ["uncached", "good"] and found["ideal"]["psnr_db"] == [
        "uncached",
        "good",
    ]


def test_the_order_of_the_papers_is_recognised():
    checks = order_checks(
        four(FORA=(4, 20), ToCa=(3, 25), DuCa=(2, 30), TaylorSeer=(1, 35)), {}, np.zeros((0, 2))
    )
    assert [check.metric for check in checks] == [FRECHET.name, PSNR.name] and all(
        check.holds for check in checks
    )
    assert all(line.endswith("as expected") and "not" not in line for line in order_lines(checks))
    assert order_lines(checks)[0].startswith(
        "interval 3, Frechet distance, best first: TaylorSeer 3: 1.000 (ideal 2.00x), DuCa 3: 2.000"
    )


def test_the_report_tells_where_the_expected_order_fails():
    by_distance, by_psnr = order_checks(
        four(FORA=(1, 20), ToCa=(3, 25), DuCa=(2, 24), TaylorSeer=(0.5, 35)), {}, np.zeros((0, 2))
    )
    assert set(by_distance.broken) == {("DuCa", "FORA"), ("ToCa", "FORA")} and by_psnr.broken == (
        ("DuCa", "ToCa"),
    )
    lines = order_lines([by_distance, by_psnr])
    assert "not as expected: FORA better than DuCa, FORA better than ToCa" in lines[0]
    assert lines[1].endswith("not as expected: ToCa better than DuCa")


def test_the_usual_setting_stands_for_its_method_or_another_one_where_it_was_not_measured():
    rows = [
        row("FORA 2", "FORA", interval=2),
        row("TaylorSeer 2 order 1", "TaylorSeer", interval=2, usual=False),
        row("TaylorSeer 2 order 4", "TaylorSeer", interval=2),
    ]

    def settings(rows):
        return {place.setting for place in order_checks(rows, {}, np.zeros((0, 2)))[0].ranking}

    assert settings(rows) == {"FORA 2", "TaylorSeer 2 order 4"} and settings(rows[:2]) == {
        "FORA 2",
        "TaylorSeer 2 order 1",
    }


def test_methods_are_ranked_only_where_two_meet():
    rows = [
        row("FORA 2", "FORA", interval=2),
        row("SmoothCache 2x", "SmoothCache", interval=None),
        row("TaylorSeer 3", "TaylorSeer"),
    ]
    assert order_checks(rows, {}, np.zeros((0, 2))) == []
    assert order_lines([]) == ["no interval at which two methods were measured"]


def test_a_difference_that_another_draw_of_pictures_could_turn_is_called_noise():
    rng = np.random.default_rng(1)
    real, same = rng.normal(size=(400, 4)), rng.normal(size=(400, 4))
    other = same + 0.02 * rng.normal(size=(400, 4))
    error = frechet_difference_error(same, other, real)
    assert 0 < error < frechet_difference_error(same, rng.normal(size=(400, 4)), real)
    rows = [row("ToCa 3", "ToCa", frechet=1.0), row("FORA 3", "FORA", frechet=1.0 - error / 2)]
    check = order_checks(rows, {"ToCa 3": same, "FORA 3": other}, real)[0]
    assert (
        check.within_noise == check.broken == (("ToCa", "FORA"),)
        and "(within noise)" in order_lines([check])[0]
    )
    far = order_checks(
        [rows[0], replace(rows[1], frechet_distance=1.0 - 10 * error)],
        {"ToCa 3": same, "FORA 3": other},
        real,
    )[0]
    assert far.broken and not far.within_noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": 1}, "pictures: expected at least 2"),
        ({"comparisons": 0}, "comparisons: expected at least 1"),
    ],
)
def test_options_that_measure_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
