"""SmoothCache: the published form, its errors, and recorded outputs of the original.

Method: docs/methods/smoothcache.md, "Conformance".
"""

import json

import pytest
import torch
from golden_data import CFG_SCALE, TOLERANCE, golden_model, load_case, relative_error
from hosts import STEPS, assert_close, reference, run, small_dit
from hypothesis import given, settings, strategies as st
from support import available_backends

import fastcache
from fastcache import ScheduleError, SmoothCache
from fastcache.plan.published import (
    FINGERPRINT,
    Fingerprint,
    PublishedSchedule,
    fora_file,
    fora_pattern,
    publish,
)
from fastcache.schedule import (
    COMPUTE,
    REUSE,
    Branch,
    Layout,
    Schedule,
    forecast,
    full_step,
    refresh,
    uniform_step,
)


def layout(depth: int = 2) -> Layout:
    return Layout(
        "DiT",
        16,
        32,
        2,
        tuple(Branch(block, name, 100) for block in range(depth) for name in ("attn", "mlp")),
    )


def flags(schedule: Schedule, name: str, block: int) -> list[int]:
    index = next(
        i for i, branch in enumerate(schedule.layout.branches) if (branch.name, branch.block) == (name, block)
    )
    return [int(step.actions[index] == COMPUTE) for step in schedule.steps]


# -- the form ---------------------------------------------------------------------------------


def test_indexed_keys_win_over_bare_keys_and_a_branch_without_key_always_computes() -> None:
    plan = SmoothCache({"attn": [1, 0, 0, 1], "attn-1": [1, 1, 0, 1]}).schedule(4, layout())
    assert flags(plan, "attn", 0) == [1, 0, 0, 1]
    assert flags(plan, "attn", 1) == [1, 1, 0, 1]
    assert flags(plan, "mlp", 0) == flags(plan, "mlp", 1) == [1, 1, 1, 1]
    assert plan.kinds() == {"full": 2, "mixed": 2}


def test_a_zero_where_nothing_is_stored_computes() -> None:
    plan = SmoothCache({"attn": [0, 0, 1, 0], "mlp": [0, 0, 0, 0]}).schedule(4, layout())
    assert flags(plan, "attn", 0) == [1, 0, 1, 0]
    assert flags(plan, "mlp", 0) == [1, 0, 0, 0]


def test_a_file_its_text_and_its_mapping_give_equal_policies(tmp_path) -> None:
    entries = {"attn": [1, 0], "mlp": [1, 1]}
    (tmp_path / "s.json").write_text(json.dumps(entries))
    policies = {
        SmoothCache(entries),
        SmoothCache(json.dumps(entries)),
        SmoothCache(tmp_path / "s.json"),
        SmoothCache(str(tmp_path / "s.json")),
        SmoothCache.load(tmp_path / "s.json"),
    }
    assert len(policies) == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "at least one key"),
        ({"attn1": [1, 0]}, "'attn1' matches no branch of this DiT, which has attn, mlp"),
        ({"attn-2": [1, 0]}, "'attn-2' matches no branch"),
        ({"attn": [1, 2]}, r"\['attn'\]\[1\]: expected 0 \(reuse\) or 1 \(compute\), got 2"),
        ({"attn": [True, False]}, "expected 0"),
        ({"attn": [1.0, 0.0]}, "expected 0"),
        ({"attn": "10"}, "expected a list"),
        ({"attn": [1, 0], "mlp": [1]}, "one length"),
        ({"attn": []}, "one length"),
        ({"attn": [1, 0, 1]}, "has 3 steps, got 2"),
        ("{nonsense", "not JSON"),
        (7, "expected"),
    ],
)
def test_what_does_not_fit_is_an_error(entries, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        SmoothCache(entries).schedule(2, layout())


def test_a_missing_file_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        SmoothCache(tmp_path / "none.json")


def test_fields_tell_two_schedules_apart() -> None:
    one, other = SmoothCache({"attn": [1, 0, 1]}), SmoothCache({"attn": [1, 1, 0]})
    assert one.fields() != other.fields()
    assert "attn 2/3" in one.fields()["schedule"]


# -- the fingerprint ---------------------------------------------------------------------------


def fingerprinted(**changes) -> dict:
    made = Fingerprint("DiT", 2, ("attn", "mlp"), 2, "ddim", 0.1, 3, "0.1.0")
    entries = PublishedSchedule.read({"attn": [1, 0], "mlp": [1, 0]}).entries
    return PublishedSchedule(entries, Fingerprint(**{**made.__dict__, **changes})).to_dict()


def test_a_schedule_for_the_same_host_and_sampler_is_accepted(tmp_path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(fingerprinted()))
    policy = SmoothCache.load(tmp_path / "s.json", scheduler="ddim")
    assert policy.schedule(2, layout()).kinds() == {"full": 1, "reuse": 1}
    assert policy.published.fingerprint.lookahead == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "PixArt"}, "family PixArt, used with DiT"),
        ({"layers": 28}, "layers 28, used with 2"),
        ({"names": ("attn", "cross", "mlp")}, "branches attn, cross, mlp"),
        ({"num_steps": 50}, "steps 50, used with 2"),
    ],
)
def test_a_schedule_made_for_another_host_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        SmoothCache(fingerprinted(**changes)).schedule(2, layout())


def test_another_scheduler_is_refused_where_it_is_named(tmp_path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(fingerprinted()))
    with pytest.raises(ScheduleError, match="calibrated with ddim, got 'dpm"):
        SmoothCache.load(tmp_path / "s.json", scheduler="dpm++")


def test_a_malformed_fingerprint_is_refused() -> None:
    with pytest.raises(ScheduleError, match="not a fingerprint"):
        SmoothCache({"attn": [1, 0], FINGERPRINT: {"family": "DiT"}})


def test_smoothcaches_reader_finds_its_entries_beside_the_fingerprint() -> None:
    """The original looks up comp-index, then comp, and nothing else (docs/methods/smoothcache.md)."""
    found = json.loads(json.dumps(fingerprinted()))
    for component, index in (("attn", 0), ("mlp", 1)):
        key = f"{component}-{index}"
        assert (found[key] if key in found else found.get(component)) == [1, 0]


# -- shipped schedules ---------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "ones"), [(30, 16), (50, 26), (70, 36)])
def test_the_shipped_fora_files_compute_at_even_steps_and_the_last(steps: int, ones: int) -> None:
    pattern = fora_pattern(steps, 2)
    assert sum(pattern) == ones and pattern[:4] == [1, 0, 1, 0] and pattern[-4:] == [1, 0, 1, 1]
    plan = SmoothCache(fora_file(steps)).schedule(steps, layout())
    assert plan.kinds() == {"full": ones, "reuse": steps - ones}


def test_the_shipped_fora_pattern_is_not_foras_own() -> None:
    assert [k for k, flag in enumerate(fora_pattern(50, 2)) if flag] == [*range(0, 50, 2), 49]
    assert fastcache.FORA(2).full_steps(50) == [0, *range(1, 50, 2)]


def test_the_shipped_018_schedule_computes_24_of_50_per_branch() -> None:
    schedule = load_case("dit_smoothcache_018").config["schedule"]
    assert {name: (sum(flags), len(flags)) for name, flags in schedule.items()} == {
        "attn": (24, 50),
        "mlp": (24, 50),
    }
    assert 24 / 50 == 0.480  # the MAC ratio of the paper's table: 175.65 of 365.59
    plan = SmoothCache(schedule).schedule(50, layout())
    assert plan.flops() / plan.uncached_flops() == pytest.approx(0.480)


@pytest.mark.parametrize("arguments", [(0, 2), (50, 0), (50, 2.0), (True, 1)])
def test_bad_arguments_of_the_pattern_are_named(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="num_steps|n:"):
        fora_pattern(*arguments)


# -- schedules and the published form ---------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda steps: st.lists(
            st.lists(st.integers(0, 1), min_size=steps, max_size=steps), min_size=6, max_size=6
        )
    )
)
def test_a_schedule_survives_the_published_form(rows: list[list[int]]) -> None:
    keys = [f"{name}-{block}" for block in range(3) for name in ("attn", "mlp")]
    plan = SmoothCache(dict(zip(keys, rows, strict=False))).schedule(len(rows[0]), layout(3))
    again = SmoothCache(plan.to_smoothcache()).schedule(len(rows[0]), layout(3))
    assert again.steps == plan.steps


def test_blocks_that_agree_share_a_bare_key() -> None:
    plan = SmoothCache({"attn-0": [1, 0], "attn-1": [1, 1], "mlp": [1, 0]}).schedule(2, layout())
    assert plan.to_smoothcache() == {"attn-0": [1, 0], "attn-1": [1, 1], "mlp": [1, 0]}


@pytest.mark.parametrize("action", [refresh(3), forecast(1)])
def test_what_the_published_form_cannot_say_is_an_error(action) -> None:
    plan = Schedule(
        layout(),
        (full_step(layout()), uniform_step(layout(), action)),
        selection=fastcache.Selection(fastcache.Score.RANDOM),
    )
    with pytest.raises(ScheduleError, match=r"steps\[1\]: the published form has COMPUTE and REUSE"):
        publish(plan.steps)


def test_union_computes_where_either_does() -> None:
    one = SmoothCache({"attn": [1, 0, 0, 1], "mlp": [1, 0, 1, 0]}).schedule(4, layout())
    other = SmoothCache({"attn": [1, 1, 0, 0], "mlp-1": [1, 0, 0, 0], "mlp-0": [1, 1, 0, 0]}).schedule(
        4, layout()
    )
    assert one.union(other).to_smoothcache() == {
        "attn": [1, 1, 0, 1],
        "mlp-0": [1, 1, 1, 0],
        "mlp-1": [1, 0, 1, 0],
    }
    assert one.union(other).steps == other.union(one).steps
    assert one.union(one).steps == one.steps


def test_union_keeps_the_larger_refresh() -> None:
    chosen = fastcache.Selection(fastcache.Score.RANDOM)
    one = Schedule(layout(), (full_step(layout()), uniform_step(layout(), refresh(3))), selection=chosen)
    other = Schedule(layout(), (full_step(layout()), uniform_step(layout(), refresh(5))), selection=chosen)
    reused = Schedule(layout(), (full_step(layout()), uniform_step(layout(), REUSE)))
    assert one.union(other).steps[1].actions[0] == refresh(5)
    assert reused.union(one).steps[1].actions[0] == refresh(3)


def test_union_refuses_other_lengths_and_layouts() -> None:
    plan = fastcache.FORA(2).schedule(4, layout())
    with pytest.raises(ScheduleError, match="4 and 5 steps"):
        plan.union(fastcache.FORA(2).schedule(5, layout()))
    with pytest.raises(ScheduleError, match="one layout"):
        plan.union(fastcache.FORA(2).schedule(4, layout(3)))


def test_a_branch_can_be_edited() -> None:
    plan = fastcache.FORA(4).schedule(5, layout())
    assert plan.with_branch("mlp", COMPUTE).to_smoothcache() == {
        "attn": [1, 0, 0, 0, 1],
        "mlp": [1, 1, 1, 1, 1],
    }
    edited = plan.with_branch("attn", COMPUTE, block=1, steps=[2])
    assert flags(edited, "attn", 1) == [1, 0, 1, 0, 1] and flags(edited, "attn", 0) == [1, 0, 0, 0, 1]
    assert edited.flops() == plan.flops() + 16 * 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cross", "action": COMPUTE}, "expected one of attn, mlp"),
        ({"name": "attn", "action": COMPUTE, "block": 2}, "blocks 0..1"),
        ({"name": "attn", "action": COMPUTE, "steps": [5]}, "expected 0..4, got 5"),
        ({"name": "attn", "action": REUSE}, "step 0 must compute attn of block 0"),
    ],
)
def test_an_edit_that_does_not_fit_is_an_error(arguments: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        fastcache.FORA(4).schedule(5, layout()).with_branch(**arguments)


# -- the command line ---------------------------------------------------------------------------------


def test_the_plan_command_takes_a_schedule_file_and_tells_a_misfit_in_one_line(tmp_path) -> None:
    pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    from typer.testing import CliRunner

    from fastcache.cli.app import app

    (tmp_path / "s.json").write_text(json.dumps(fora_file(30)))
    command = ["plan", "--policy", "smoothcache", "--set", f"schedule={tmp_path / 's.json'}", "--steps"]
    result = CliRunner().invoke(app, [*command, "30"])
    assert result.exit_code == 0 and "SmoothCache" in result.output and "16" in result.output, result.output
    result = CliRunner().invoke(app, [*command, "50"])
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert "the schedule has 30 steps, got 50" in result.output


def test_the_plan_command_knows_taylorseer_and_names_bad_settings() -> None:
    pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    from typer.testing import CliRunner

    from fastcache.cli.app import app

    result = CliRunner().invoke(app, ["plan", "--policy", "taylorseer", "--set", "interval=5"])
    assert result.exit_code == 0 and "TaylorSeer(interval=5, max_order=4, first_enhance=2)" in " ".join(
        result.output.split()
    ), result.output
    for setting, message in (("order=3", "interval, max_order, first_enhance"), ("interval=0", "interval")):
        result = CliRunner().invoke(app, ["plan", "--policy", "taylorseer", "--set", setting])
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split()), (
            result.output
        )


# -- running ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [False, True], ids=["modules", "table"])
@pytest.mark.parametrize("backend", available_backends("cpu"))
@torch.no_grad()
def test_every_step_equals_the_original(backend: str, announced: bool) -> None:
    model, case = golden_model(), load_case("dit_smoothcache_018")
    calls = list(case.calls())
    with (
        fastcache.use_backend(backend),
        fastcache.accelerate(model, SmoothCache(case.config["schedule"]), len(calls)) as session,
    ):
        if announced:
            session.begin(timesteps=case.timesteps.float(), conditions={"y": calls[0].y})
        errors = [
            relative_error(model.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE), call.out)
            for call in calls
        ]
    assert max(errors) < TOLERANCE, errors
    assert {kind: row.count for kind, row in session.summary().steps.items()} == {"full": 24, "reuse": 26}


@pytest.mark.parametrize("backend", available_backends("cpu"))
@torch.no_grad()
def test_an_indexed_schedule_equals_the_definition(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = {
        f"{name}-{block}": [1, *torch.randint(0, 2, (STEPS - 1,), generator=generator).tolist()]
        for block in range(3)
        for name in ("attn", "mlp")
    }
    model = small_dit()
    expected = _by_definition(model, rows)
    with fastcache.use_backend(backend), fastcache.accelerate(model, SmoothCache(rows), STEPS) as session:
        found = run(model)
    assert_close(found, expected)
    assert session.summary().recomputed == 0


@torch.no_grad()
def test_a_second_generation_equals_the_first() -> None:
    model = small_dit()
    with fastcache.accelerate(model, SmoothCache(fora_file(STEPS)), STEPS):
        first, second = run(model), run(model)
    assert_close(second, first, 1e-12)
    assert_close(first, reference(model, [k for k, flag in enumerate(fora_pattern(STEPS, 2)) if flag]))


def _by_definition(model, rows: dict[str, list[int]]) -> list[torch.Tensor]:
    from hosts import inputs

    stored, outputs = {}, []
    for step in range(STEPS):
        x, t, y = inputs(step)
        x, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
        for index, block in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            for name, body, norm, shift, scale, gate in (
                ("attn", block.attn, block.norm1, shift1, scale1, gate1),
                ("mlp", block.mlp, block.norm2, shift2, scale2, gate2),
            ):
                if rows[f"{name}-{index}"][step]:
                    stored[name, index] = body(norm(x) * (1 + scale) + shift)
                x = x + gate * stored[name, index]
        outputs.append(model._unpatch(model.final_layer(x, c)))
    return outputs
