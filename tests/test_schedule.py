"""Actions, plans and schedules: text forms, costs, checks, drawing."""

import json

import pytest
from hosts import small_dit

import fastcache
from fastcache.errors import ScheduleError
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.schedule import (
    COMPUTE,
    REUSE,
    Action,
    Branch,
    Kind,
    Layout,
    Schedule,
    Score,
    Selection,
    StepPlan,
    forecast,
    full_step,
    refresh,
    skip_step,
    uniform_step,
)

LAYOUT = Layout(
    "test",
    tokens=10,
    width=4,
    heads=2,
    branches=(
        Branch(0, "attn", 100, 3),
        Branch(0, "mlp", 200),
        Branch(1, "attn", 100, 3),
        Branch(1, "mlp", 200),
    ),
    fixed_flops=7,
    modulation_flops=11,
)


@pytest.mark.parametrize("action", [COMPUTE, REUSE, refresh(0), refresh(21), forecast(0), forecast(4)])
def test_an_action_survives_its_code(action: Action) -> None:
    assert Action.from_code(action.code) == action


@pytest.mark.parametrize("code", ["", "X", "P", "F", "C3", "R1", "Px", "P-1"])
def test_a_malformed_code_is_an_error(code: str) -> None:
    with pytest.raises(ScheduleError):
        Action.from_code(code)


@pytest.mark.parametrize(
    ("actions", "kind"),
    [
        ((COMPUTE,) * 4, "full"),
        ((REUSE,) * 4, "reuse"),
        ((REUSE, refresh(2), REUSE, refresh(3)), "partial"),
        ((forecast(1), REUSE, REUSE, REUSE), "forecast"),
        ((COMPUTE, REUSE, REUSE, REUSE), "mixed"),
    ],
)
def test_the_kind_of_a_step_follows_from_its_actions(actions, kind) -> None:
    assert StepPlan(LAYOUT, actions).kind == kind


def test_flops_count_what_is_computed() -> None:
    attn, mlp, overhead = 10 * (100 + 3 * 10), 10 * 200, 7 + 2 * 11
    assert full_step(LAYOUT).flops(batch=3) == 3 * (2 * (attn + mlp) + overhead)
    assert uniform_step(LAYOUT, REUSE).flops() == overhead
    assert StepPlan(LAYOUT, (REUSE, refresh(4), REUSE, refresh(0))).flops() == 4 * 200 + overhead
    assert uniform_step(LAYOUT, forecast(2)).flops() == overhead
    assert skip_step(LAYOUT).flops() == 7


def test_ideal_speedup_is_uncached_over_planned() -> None:
    schedule = Schedule(LAYOUT, (full_step(LAYOUT), skip_step(LAYOUT)))
    assert (
        schedule.ideal_speedup()
        == schedule.uncached_flops() / schedule.flops()
        == 2 * full_step(LAYOUT).flops() / (full_step(LAYOUT).flops() + 7)
    )


def test_flops_of_a_dit_equal_a_count_of_its_matrix_multiplies() -> None:
    """2 per multiply-add of every matrix multiply and attention that a real forward dispatches."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = small_dit()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert full_step(recognise(model).layout()).flops(batch=2) == counter.get_total_flops()


def test_dit_xl_2_costs_what_is_published() -> None:
    """118.64 GFLOPs (multiply-adds) a forward at 256 px, Peebles and Xie, table 4 (XL/2)."""
    import torch

    with torch.device("meta"):
        model = DiT.preset("DiT-XL/2", 32)
    assert full_step(recognise(model).layout()).flops() / 2e9 == pytest.approx(118.64, rel=0.005)


def test_a_schedule_survives_json(tmp_path) -> None:
    schedule = Schedule(
        LAYOUT,
        (
            full_step(LAYOUT),
            uniform_step(LAYOUT, REUSE),
            StepPlan(LAYOUT, (REUSE, refresh(4), forecast(1), COMPUTE)),
            skip_step(LAYOUT),
            StepPlan(LAYOUT, (COMPUTE, COMPUTE, REUSE, REUSE), skip=True),
        ),
        "custom",
        {"interval": 3},
        Selection(Score.ATTENTION, 0.25 / 3, 2, 0.6),
    )
    assert Schedule.from_json(schedule.to_json()) == schedule
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule


def test_a_schedule_that_refreshes_says_how_tokens_are_chosen() -> None:
    with pytest.raises(ScheduleError, match="selection: a schedule that refreshes tokens"):
        Schedule(LAYOUT, (StepPlan(LAYOUT, (REUSE, refresh(4), REUSE, REUSE)),))
    with pytest.raises(ScheduleError, match="score: expected one of attention, .*, got 'beauty'"):
        Selection("beauty")
    with pytest.raises(ScheduleError, match="cell, bonus"):
        Selection("attention", bonus=0.6)


def test_a_skipped_step_costs_the_blocks_that_compute_in_it() -> None:
    full, skipped = full_step(LAYOUT), StepPlan(LAYOUT, (COMPUTE, COMPUTE, REUSE, REUSE), skip=True)
    assert skipped.run_blocks == {0} and skipped.kind == "skip"
    assert skipped.flops() - skip_step(LAYOUT).flops() == (full.flops() - skip_step(LAYOUT).flops()) // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"steps": ["C C"]}, r"steps\[0\]: actions: expected one per branch \(4\), got 2"),
        ({"steps": []}, "at least one step"),
        ({"layout": {"family": "x"}}, "malformed"),
        ({"steps": ["C C C Q"]}, r"steps\[0\]: action"),
    ],
)
def test_a_malformed_schedule_names_the_entry(change: dict, message: str) -> None:
    good = json.loads(Schedule(LAYOUT, (full_step(LAYOUT),)).to_json())
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(json.dumps({**good, **change}))


def test_a_plan_of_another_layout_is_refused() -> None:
    other = Layout("other", 10, 4, 2, LAYOUT.branches[:2])
    with pytest.raises(ScheduleError, match=r"steps\[0\]: was made for another layout"):
        Schedule(LAYOUT, (full_step(other),))


def test_tokens_and_orders_belong_to_their_actions() -> None:
    for arguments in (
        {"kind": Kind.REUSE, "tokens": 3},
        {"kind": Kind.REFRESH},
        {"kind": Kind.FORECAST},
        {"kind": Kind.COMPUTE, "order": 1},
        {"kind": Kind.REFRESH, "tokens": -1},
    ):
        with pytest.raises(ScheduleError):
            Action(**arguments)


def test_a_schedule_draws_every_step_and_branch(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    schedule = fastcache.FORA(3).schedule(50, recognise(small_dit()).layout())
    schedule.draw(tmp_path / "steps.png")
    colours = {colour for _, colour in image.open(tmp_path / "steps.png").convert("RGB").getcolors(1 << 20)}
    assert {(0xB1, 0x3F, 0x3F), (0xDF, 0xE7, 0xEE)} <= colours
