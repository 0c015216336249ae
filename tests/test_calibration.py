"""Calibration: the greedy scan, the search for a threshold, and errors measured on a model.

Method: docs/methods/smoothcache.md, "Calibration".
"""

import itertools
import json
import math

import pytest
import torch
from hosts import STEPS, foreign_dit, inputs, run, small_dit
from hypothesis import given, settings, strategies as st
from torch import Tensor

import fastcache
import fastcache.calibration.errors
from fastcache import FORA, Calibration, ScheduleError, SessionError, SmoothCache
from fastcache.calibration.errors import ErrorObserver
from fastcache.calibration.scan import ErrorCurves, greedy_schedule
from fastcache.hosts import recognise
from fastcache.plan.published import FINGERPRINT
from fastcache.schedule import Branch, Layout

EXAMPLE = (
    (0.05, 0.05, 0.20, 0.05, 0.30, 0.05, 0.05, 0.30, 0.05),
    (0.09, 0.20, 0.20, 0.20, 0.30, 0.09, 0.20, 0.30),
    (0.12, 0.30, 0.30, 0.30, 0.30, 0.12, 0.30),
)


def layout(depth: int = 2) -> Layout:
    return Layout(
        "DiT",
        16,
        32,
        2,
        tuple(
            Branch(block, name, 100 if name == "attn" else 300)
            for block in range(depth)
            for name in ("attn", "mlp")
        ),
        fixed_flops=1000,
        modulation_flops=50,
    )


def relative_error(newest: list[Tensor], earlier: list[Tensor]) -> Tensor:
    """The definition of the operator, written again."""
    L = len(newest)
    values = [(old - newest[j % L]).abs().sum() / newest[j % L].abs().sum() for j, old in enumerate(earlier)]
    return torch.stack(values).view(-1, L).float()


error = st.floats(0, 1) | st.sampled_from([0.0, math.nan, math.inf])
rows = st.tuples(st.integers(2, 14), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        *(
            st.lists(error, min_size=max(0, shape[0] - 1 - j), max_size=max(0, shape[0] - 1 - j)).map(tuple)
            for j in range(shape[1])
        )
    )
)


# -- the scan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "schedule"),
    [(0.10, "1001010011"), (0.12, "1000110001"), (0.04, "1111111111"), (0.50, "1000100011")],
)
def test_the_scan_of_ten_steps_is_the_originals(threshold: float, schedule: str) -> None:
    assert "".join(map(str, greedy_schedule(EXAMPLE, threshold))) == schedule


@settings(deadline=None)
@given(rows, st.floats(0, 1))
def test_first_and_last_compute_and_at_most_k_in_a_row_are_reused(errors, threshold: float) -> None:
    schedule = greedy_schedule(errors, threshold)
    assert len(schedule) == len(errors[0]) + 1 and set(schedule) <= {0, 1}
    assert schedule[0] == schedule[-1] == 1
    assert max(map(len, "".join(map(str, schedule)).split("1"))) <= len(errors)


@settings(deadline=None)
@given(rows, st.floats(0, 1))
def test_every_run_of_reuses_was_allowed_by_the_error_at_its_far_end(errors, threshold: float) -> None:
    schedule = greedy_schedule(errors, threshold)
    T = len(schedule)
    computed = [i for i, flag in enumerate(schedule) if flag] + [T]
    for i, following in itertools.pairwise(computed):
        skips = following - i - 1
        # a run that ends at the last step was longer by the one that must compute
        allowed = [skips, skips + 1] if following == T - 1 else [skips]
        assert skips == 0 or any(
            j and i < len(errors[j - 1]) and errors[j - 1][i] <= threshold
            for j in allowed
            if j <= len(errors)
        )


@settings(deadline=None)
@given(rows)
def test_a_negative_threshold_and_nan_errors_reuse_nothing(errors) -> None:
    assert all(greedy_schedule(errors, -1.0))
    assert all(greedy_schedule([[math.nan] * len(row) for row in errors], 1.0))


@pytest.mark.parametrize("errors", [[], [[0.1, 0.2], [0.1, 0.2]], [[0.1, 0.2], []]])
def test_rows_of_wrong_lengths_are_named(errors) -> None:
    with pytest.raises(ValueError, match="errors"):
        greedy_schedule(errors, 0.1)


# -- curves -------------------------------------------------------------------------------------------


def curves(scale: float = 1.0, samples: int = 1) -> ErrorCurves:
    """Branches 0..3 = attn 0, mlp 0, attn 1, mlp 1; block 1's errors are three times block 0's."""

    def times(factor: float):
        return tuple(tuple(factor * value for value in row) for row in EXAMPLE)

    return ErrorCurves(
        layout(), (times(scale * 0.5), times(scale), times(scale * 1.5), times(scale * 3)), samples
    )


def test_branches_of_one_name_share_the_schedule_of_their_mean_error() -> None:
    published = curves().published(0.10)
    assert [key for key, _ in published.entries] == ["attn", "mlp"]
    assert (
        "".join(map(str, published.flags("attn", 0))) == "1001010011"
    )  # the mean of 0.5 and 1.5 times the example
    assert published.flags("mlp", 1) == tuple(
        greedy_schedule([[2 * value for value in row] for row in EXAMPLE], 0.10)
    )


def test_per_layer_schedules_are_indexed() -> None:
    published = curves().published(0.10, per_layer=True)
    assert [key for key, _ in published.entries] == ["attn-0", "mlp-0", "attn-1", "mlp-1"]
    assert published.flags("attn", 0) != published.flags("attn", 1)
    assert SmoothCache(published).schedule(10, layout()).num_steps == 10


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("target", [1.05, 1.2, 1.5, 1.7, 2.0])
def test_the_threshold_for_a_speedup_is_the_smallest_that_reaches_it(per_layer: bool, target: float) -> None:
    found = curves().threshold_for(target, per_layer)

    def speedup(threshold: float) -> float:
        return SmoothCache(curves().published(threshold, per_layer)).schedule(10, layout()).ideal_speedup()

    assert speedup(found) >= target
    candidates = sorted(
        {value for rows in curves().keyed(per_layer).values() for row in rows for value in row}
    )
    assert found in candidates and all(speedup(value) < target for value in candidates if value < found)


def test_a_larger_threshold_may_compute_more_and_the_search_knows() -> None:
    errors = ((0.2, 0.9, 0.9, 0.9, 0.9), (0.2, 0.1, 0.2, 0.9), (0.9, 0.1, 0.1))
    assert (sum(greedy_schedule(errors, 0.1)), sum(greedy_schedule(errors, 0.2))) == (
        3,
        4,
    )  # only the farthest error is tested
    found = ErrorCurves(layout(1), (errors, errors))
    assert found.threshold_for(1.6) == 0.1
    with pytest.raises(ScheduleError, match=r"at most 1\..* \(threshold 0.1\)"):
        found.threshold_for(3.0)


def test_a_speedup_out_of_reach_names_what_is_within() -> None:
    best = max(
        SmoothCache(curves().published(value)).schedule(10, layout()).ideal_speedup()
        for value in (0.1, 0.2, 0.3, 0.6, 1.0)
    )
    with pytest.raises(
        ScheduleError, match=rf"100 is out of reach with a look-ahead of 3; at most {best:.2f}"
    ):
        curves().threshold_for(100)


def test_no_speedup_needs_no_threshold() -> None:
    assert curves().threshold_for(1.0) == 0.0


@pytest.mark.parametrize("target", [0.5, math.nan, math.inf])
def test_a_bad_target_is_named(target: float) -> None:
    with pytest.raises(ValueError, match="target_speedup"):
        curves().threshold_for(target)


def test_a_saved_calibration_has_a_fingerprint_and_is_checked_on_load(tmp_path) -> None:
    found = Calibration(curves(), 0.10, scheduler="ddim")
    found.save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written[FINGERPRINT] == {
        "family": "DiT",
        "layers": 2,
        "names": ["attn", "mlp"],
        "num_steps": 10,
        "scheduler": "ddim",
        "threshold": 0.10,
        "lookahead": 3,
        "version": fastcache.__version__,
    }
    assert {
        key: value for key, value in written.items() if key != FINGERPRINT
    } == found.schedule().to_smoothcache()
    policy = SmoothCache.load(tmp_path / "s.json", scheduler="ddim")
    assert policy == found.policy() and policy.schedule(10, layout()).steps == found.schedule().steps
    with pytest.raises(ScheduleError, match="layers 2, used with 3"):
        policy.schedule(10, layout(3))


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_calibration_is_drawn(tmp_path, per_layer: bool) -> None:
    pytest.importorskip("matplotlib")
    Calibration(curves(), 0.10, per_layer).draw(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 0


# -- the observer ----------------------------------------------------------------------------------------


def observed(features: Tensor, K: int, runs: int = 1) -> ErrorObserver:
    """features [runs, T, L, B, N, D] given to an observer as a session would."""
    _, T, L = features.shape[:3]
    branches = tuple(Branch(block, "attn", 1) for block in range(L))
    observer = ErrorObserver(Layout("DiT", 4, 2, 1, branches), T, K, relative_error)
    for run_features in features:
        history: list[list[Tensor]] = [[] for _ in range(L)]
        for step in range(T):
            for kept, feature in zip(history, run_features[step], strict=False):
                kept.insert(0, feature)
                del kept[observer.history :]
            observer(step, 0, history)
        observer.end_run()
    return observer


@pytest.mark.parametrize(("runs", "K"), [(1, 1), (1, 3), (3, 3), (2, 5)])
def test_observed_errors_are_the_published_ones_averaged_over_runs(runs: int, K: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(runs, 6, 3, 2, 4, 2)
    found = observed(features, K).curves()
    assert (found.num_steps, found.lookahead, found.samples) == (6, K, runs)
    for branch in range(3):
        for j in range(K):
            for i in range(5 - j):
                old, new = features[:, i, branch].double(), features[:, i + j + 1, branch].double()
                expected = ((old - new).abs().flatten(1).sum(1) / new.abs().flatten(1).sum(1)).mean()
                assert found.errors[branch][j][i] == pytest.approx(float(expected), rel=1e-5)


def test_one_operator_call_a_step_and_none_at_the_first() -> None:
    calls = []
    features = torch.randn(5, 2, 1, 4, 2)
    observer = ErrorObserver(
        layout(1),
        5,
        3,
        lambda newest, earlier: calls.append((len(newest), len(earlier))) or relative_error(newest, earlier),
    )
    history: list[list[Tensor]] = [[], []]
    for step in range(5):
        for kept, feature in zip(history, features[step], strict=False):
            kept.insert(0, feature)
        observer(step, 0, history)
    assert calls == [(2, 2), (2, 4), (2, 6), (2, 6)]  # a longer history than asked for is not an error


def test_two_calls_a_step_are_averaged() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 1, 1, 4, 2)
    observer = ErrorObserver(Layout("DiT", 4, 2, 1, (Branch(0, "attn", 1),)), 4, 2, relative_error)
    histories: list[list[Tensor]] = [[], []]
    for step in range(4):
        for call in range(2):
            histories[call].insert(0, features[call, step, 0])
            observer(step, call, [histories[call]])
    observer.end_run()
    both = observed(features, 2, runs=2).curves()
    assert observer.curves().errors[0][1] == pytest.approx(both.errors[0][1])
    assert observer.curves().samples == 1


def test_the_observer_uses_the_operator_by_default() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 4, 2, 1, 4, 2)
    expected = observed(features, 2).curves()
    observer = ErrorObserver(Layout("DiT", 4, 2, 1, (Branch(0, "attn", 1), Branch(1, "attn", 1))), 4, 2)
    for step in range(4):
        observer(step, 0, [[features[0, s, branch] for s in range(step, -1, -1)][:3] for branch in range(2)])
    observer.end_run()
    found = observer.curves()
    assert all(
        a == pytest.approx(b, rel=1e-5)
        for one, other in zip(found.errors, expected.errors, strict=False)
        for a, b in zip(one, other, strict=False)
    )


def test_runs_of_another_length_and_missing_features_are_errors() -> None:
    observer = ErrorObserver(layout(1), 3, 2, relative_error)
    feature = torch.ones(1, 4, 2)
    observer(0, 0, [[feature], [feature]])
    with pytest.raises(SessionError, match="expected step 1 of call 0, got 2"):
        observer(2, 0, [[feature] * 3, [feature] * 3])
    with pytest.raises(SessionError, match="expected 2 features of each of 2 branches at step 1"):
        observer(1, 0, [[feature], [feature]])
    with pytest.raises(SessionError, match="expected 3 model evaluations in a run, got 1"):
        observer.end_run()
    with pytest.raises(SessionError, match="no run was recorded"):
        observer.curves()


# -- calibrate ----------------------------------------------------------------------------------------------


class StandIn:
    """A session that only observes: hooks on the branch bodies and on the final layer."""

    def __init__(
        self, model, schedule, num_steps, *, observer, history, calls_per_step, count_ops, host
    ) -> None:
        assert schedule.uncached and schedule.num_steps == num_steps
        self.model, self.observer, self.steps, self.hooks, self.step = model, observer, num_steps, [], 0
        self.history: list[list[Tensor]] = [[] for _ in schedule.layout.branches]

    def __enter__(self):
        bodies = [body for block in self.model.blocks for body in (block.attn, block.mlp)]
        self.hooks = [
            body.register_forward_hook(lambda _m, _a, out, kept=kept: kept.insert(0, out))
            for body, kept in zip(bodies, self.history, strict=False)
        ]
        self.hooks.append(self.model.final_layer.register_forward_hook(self.after))
        return self

    def after(self, *_):
        self.observer(self.step, 0, self.history)
        self.step = (self.step + 1) % self.steps
        if self.step == 0:
            for kept in self.history:
                kept.clear()

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(params=["session", "stand-in"])
def session(request, monkeypatch) -> None:
    if request.param == "stand-in":
        monkeypatch.setattr(fastcache.calibration.errors, "Session", StandIn)


def shifted_run(model):
    @torch.no_grad()
    def run_once(sample: int) -> None:
        for step in range(STEPS):
            x, t, y = inputs(step)
            model(x + sample, t, y)

    return run_once


@pytest.mark.parametrize("samples", [1, 3])
def test_calibrate_measures_a_model(session, samples: int) -> None:
    model, outputs = small_dit(), []
    found = fastcache.calibrate(
        model, shifted_run(model), threshold=0.8, num_steps=STEPS, samples=samples, scheduler="ddim"
    )
    for sample in range(samples):
        kept: list[Tensor] = []
        hook = model.blocks[1].mlp.register_forward_hook(lambda _m, _a, out: kept.append(out.double()))
        shifted_run(model)(sample)
        hook.remove()
        outputs.append(kept)
    E1 = [
        sum(float((kept[i] - kept[i + 2]).abs().sum() / kept[i + 2].abs().sum()) for kept in outputs)
        / samples
        for i in range(STEPS - 2)
    ]
    assert found.curves.errors[3][1] == pytest.approx(E1, rel=1e-4)
    assert (
        found.curves.samples == samples
        and found.curves.lookahead == 3
        and found.published.fingerprint.scheduler == "ddim"
    )
    assert [(branch.block, branch.name) for branch in found.curves.layout.branches][3] == (1, "mlp")
    with torch.no_grad(), fastcache.accelerate(model, found.policy(), STEPS) as running:
        run(model)
    assert running.summary().recomputed == 0


def test_calibrate_reaches_a_target(session) -> None:
    model = small_dit()
    for per_layer in (False, True):
        found = fastcache.calibrate(
            model, shifted_run(model), target_speedup=1.5, num_steps=STEPS, per_layer=per_layer
        )
        assert found.schedule().ideal_speedup() >= 1.5
    with pytest.raises(ScheduleError, match="out of reach"):
        fastcache.calibrate(model, shifted_run(model), target_speedup=50.0, num_steps=STEPS)


@torch.no_grad()
def test_a_host_without_a_token_count_is_measured_with_that_of_its_features(session) -> None:
    model = foreign_dit()
    assert recognise(model).layout().tokens == 0
    found = fastcache.calibrate(model, lambda sample: run(model), target_speedup=1.2, num_steps=STEPS)
    assert found.curves.layout.tokens == 64 and found.schedule().ideal_speedup() >= 1.2


def test_calibrate_refuses_runs_of_another_length(session) -> None:
    model = small_dit()
    with pytest.raises(SessionError, match="num_steps"):
        fastcache.calibrate(model, lambda sample: run(model, STEPS - 2), threshold=0.1, num_steps=STEPS)
    with pytest.raises(SessionError, match="num_steps|no run"):
        fastcache.calibrate(model, lambda sample: None, threshold=0.1, num_steps=STEPS)
    with torch.no_grad(), fastcache.accelerate(model, FORA(2), STEPS):
        run(model)  # the model was given back


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"threshold": 0.1, "target_speedup": 2.0}, "exactly one"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": 0.1, "lookahead": 0}, "lookahead"),
        ({"threshold": 0.1, "samples": 0}, "samples"),
        ({"threshold": 0.1, "num_steps": 1}, "num_steps"),
        ({"threshold": 0.1, "num_steps": 2.0}, "num_steps"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastcache.calibrate(small_dit(), lambda sample: None, **{"num_steps": STEPS, **arguments})


def test_the_command_writes_a_schedule_and_a_picture(session, tmp_path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    from typer.testing import CliRunner

    from fastcache.cli.app import app
    from fastcache.models import DiT
    from fastcache.models.checkpoint import Checkpoint, write_checkpoint

    torch.manual_seed(0)
    model = DiT(8, 4, 3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    for block in model.blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    write_checkpoint(tmp_path / "tiny.safetensors", Checkpoint(model.state_dict(), model.config, {}))
    common = [
        "--checkpoint",
        tmp_path / "tiny.safetensors",
        "--num-heads",
        2,
        "--classes",
        "0-1",
        "--steps",
        6,
    ]

    def invoke(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    out = tmp_path / "made" / "s.json"
    result = invoke(
        "calibrate",
        "--out",
        out,
        "--draw",
        tmp_path / "c.png",
        "--target-speedup",
        1.3,
        "--samples",
        2,
        *common,
    )
    assert result.exit_code == 0, result.output
    assert "ideal speedup" in result.output and (tmp_path / "c.png").exists()
    made = SmoothCache.load(out, scheduler="ddim").published.fingerprint
    assert (made.num_steps, made.layers, made.scheduler) == (6, 2, "ddim")
    result = invoke(
        "sample",
        "--out",
        tmp_path / "pictures",
        "--policy",
        "smoothcache",
        "--set",
        f"schedule={out}",
        *common,
    )
    assert result.exit_code == 0 and "SmoothCache" in result.output, result.output
    result = invoke("calibrate", "--out", out, *common)
    assert result.exit_code == 2 and "exactly one" in result.output
