"""DuCa's plans: the order of full, partial and skipped steps, flips, FLOPs, recorded runs.

Method: docs/methods/duca.md, "Conformance".
"""

from dataclasses import fields

import pytest
from golden_data import load_actions
from token_plans import as_recorded, computed_blocks, kinds, layout, tokens_at

import fastcache
from fastcache import DuCa, Score, ToCa
from fastcache.schedule import COMPUTE, REUSE

REFERENCE = DuCa(3, 0.05, reproduce_reference=True)


@pytest.mark.parametrize("case", [name for name, case in load_actions().items() if case.method == "DuCa"])
def test_every_action_and_number_of_tokens_is_the_originals(case: str) -> None:
    golden = load_actions()[case]
    schedule = DuCa(**golden.fields, reproduce_reference=True).schedule(
        len(golden.actions), layout(golden.family, golden.tokens)
    )
    assert [as_recorded(step) for step in schedule.steps] == golden.actions


@pytest.mark.parametrize(("threshold", "flops"), [(3, 9_575_027_995_904), (4, 7_661_996_043_008)])
def test_flops_are_the_published_ones(threshold: int, flops: int) -> None:
    assert DuCa(threshold, 0.05, reproduce_reference=True).reference_flops(50, layout(), batch=2) == flops


def test_the_reference_flips_to_a_partial_step_at_45_and_to_a_skipped_one_at_32() -> None:
    schedule = REFERENCE.schedule(50, layout())
    found = kinds(schedule)
    to_partial, to_skipped = 49 - 45, 49 - 32
    assert (found.count("F"), found.count("P"), found.count("A"), found.count("M")) == (18, 22, 8 + 1, 1)
    assert as_recorded(schedule.steps[to_partial]) == "F" + "P" * 27
    assert as_recorded(schedule.steps[to_skipped]) == "F" + "A" * 27
    assert computed_blocks(schedule) == 506


def test_a_flip_to_a_skipped_step_computes_block_0_and_uses_nothing_of_it() -> None:
    step = REFERENCE.schedule(50, layout()).steps[49 - 32]
    assert step.skip and step.run_blocks == {0}
    assert step.actions == (COMPUTE, COMPUTE) + (REUSE,) * 54


def test_by_default_a_step_is_one_thing_and_flips_are_full_steps() -> None:
    schedule = DuCa(3, 0.05).schedule(50, layout())
    assert schedule.kinds() == {"full": 20, "partial": 22, "skip": 8}
    assert all(len(set(as_recorded(step))) == 1 for step in schedule.steps)


@pytest.mark.parametrize(
    ("family", "scheduler", "threshold", "cycle"),
    [
        ("DiT", "ToCa", 2, "FP"),
        ("DiT", "ToCa", 3, "FAP"),
        ("DiT", "ToCa", 4, "FPAP"),
        ("DiT", "ToCa", 5, "FAPAP"),
        ("PixArt", "ToCa", 2, "FP"),
        ("PixArt", "ToCa", 3, "FPA"),
        ("PixArt", "ToCa", 4, "FPAP"),
        ("PixArt", "ToCa", 5, "FPAPA"),
    ],
)
def test_the_order_after_a_full_step_follows_the_hosts_numbering(
    family: str, scheduler: str, threshold: int, cycle: str
) -> None:
    """A ratio of zero keeps DiT's interval; 61 steps number the first one 60, a multiple of each
    threshold.
    """
    assert (
        kinds(DuCa(threshold, 0.0, ratio_scheduler=scheduler).schedule(61, layout(family)))
        == (cycle * 61)[:61]
    )


def test_on_pixart_the_interval_stays_and_nothing_flips() -> None:
    assert kinds(DuCa(3, 0.75, reproduce_reference=True).schedule(20, layout("PixArt"))) == "FPA" * 6 + "FP"


def test_on_open_sora_every_third_step_is_skipped_and_the_last_one_is() -> None:
    schedule = DuCa(3, 0.1).schedule(30, layout("STDiT3", 23850))
    assert [k for k, step in enumerate(schedule.steps) if step.skip] == list(range(5, 30, 3))
    for name, full in {
        "attn": [0, 1, 2, *range(3, 30, 3)],
        "mlp": [0, 1, 2, *range(3, 30, 3)],
        "cross": [0, 1, 2, 6, 12, 18, 24],
    }.items():
        index = next(index for index, branch in enumerate(schedule.layout.branches) if branch.name == name)
        assert [k for k, step in enumerate(schedule.steps) if step.actions[index] == COMPUTE] == full
    assert tokens_at(schedule, 4, 55, "mlp") == 3565 and tokens_at(schedule, 4, 55, "cross") is None
    assert DuCa(7, 0.1).schedule(30, layout("STDiT3", 23850)).steps == schedule.steps


@pytest.mark.parametrize(("family", "twin"), [("DiT", "ToCa-ddim50"), ("PixArt", "ToCa"), ("STDiT3", "ToCa")])
def test_a_partial_step_is_tocas(family: str, twin: str) -> None:
    """With a threshold that no step but the first meets, odd remainders of DuCa are partial and all of
    ToCa's.
    """
    duca, toca = (
        DuCa(1001, 0.1).schedule(30, layout(family)),
        ToCa(1001, 0.1, ratio_scheduler=twin).schedule(30, layout(family)),
    )
    both = [k for k in range(30) if duca.steps[k].kind == toca.steps[k].kind == "partial"]
    assert len(both) >= 9
    assert all(
        tokens_at(duca, k, block, "mlp") == tokens_at(toca, k, block, "mlp")
        for k in both
        for block in range(duca.layout.depth)
    )


@pytest.mark.parametrize(
    ("scheduler", "factor"),
    [
        ("constant", 1.0),
        ("linear", 1.9 - 1.8 * 0.25),
        ("exp", 0.9**0.25),
        ("linear-layerwise", (1.4 - 0.8 * 0.25) * 1.8 * 2.5),
        ("layerwise", 1.9),
    ],
)
def test_the_other_ratio_schedules_are_tocas(scheduler: str, factor: float) -> None:
    schedule = DuCa(1001, 0.1, ratio_scheduler=scheduler).schedule(20, layout("DiT", 4096))
    assert tokens_at(schedule, 19 - 5, 0, "mlp") == int(0.1 * factor * 4096)


@pytest.mark.parametrize("scheduler", ["ToCa-ddim50", "ToCa-ddpm250"])
def test_the_schedules_that_only_toca_has_are_refused(scheduler: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"ratio_scheduler: expected one of constant, .*ToCa, linear-layerwise, got '{scheduler}'",
    ):
        DuCa(ratio_scheduler=scheduler)


@pytest.mark.parametrize(
    ("family", "cell", "bonus"), [("DiT", 2, 0.8), ("PixArt", 4, 0.4), ("STDiT3", 0, 0.0)]
)
def test_the_spatial_bonus_belongs_to_the_host(family: str, cell: int, bonus: float) -> None:
    selection = (
        DuCa(fresh_threshold=5, cache_type="kv-norm", soft_fresh_weight=0.5)
        .schedule(10, layout(family))
        .selection
    )
    assert (selection.score, selection.age_weight, selection.cell, selection.bonus) == (
        Score.KV_NORM,
        0.1,
        cell,
        bonus,
    )


def test_force_fresh_local_is_known_on_dit_alone() -> None:
    local = DuCa(3, 0.05, force_fresh="local", reproduce_reference=True)
    assert local.schedule(50, layout()).steps == REFERENCE.schedule(50, layout()).steps
    assert local.schedule(50, layout()).selection.age_weight == 0
    for family in ("PixArt", "STDiT3"):
        with pytest.raises(ValueError, match=f"force_fresh: .* DuCa does not run on {family}"):
            local.schedule(20, layout(family))


def test_settings_have_the_names_order_and_defaults_of_the_method() -> None:
    assert [field.name for field in fields(DuCa)] == [field.name for field in fields(ToCa)]
    assert DuCa().ratio_scheduler == "ToCa"
    assert fastcache.policies.POLICIES["duca"] is fastcache.DuCa
    with pytest.raises(ValueError, match="layout.family: DuCa has rules for DiT, PixArt, STDiT3, got 'x'"):
        DuCa().schedule(5, fastcache.schedule.Layout("x", 256, 4, 1, layout().branches))
