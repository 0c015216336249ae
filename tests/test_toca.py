"""ToCa's plans: step kinds, tokens a layer, FLOPs to the last digit, recorded runs.

Method: docs/methods/toca.md, "Conformance".
"""

from dataclasses import fields

import pytest
from golden_data import load_actions
from token_plans import as_recorded, computed_blocks, kinds, layout, tokens_at

import fastcache
from fastcache import FORA, DuCa, Schedule, Score, ToCa
from fastcache.policies.fresh_ratio import Line
from fastcache.policies.toca import DIT
from fastcache.policies.token_steps import AdaptiveCycle
from fastcache.schedule import Layout

DDIM = ToCa(fresh_threshold=3, reproduce_reference=True)
ALL_PARTIAL = 100  # a threshold above the number of steps of every test that uses it


def ddpm(threshold: int) -> ToCa:
    return ToCa(fresh_threshold=threshold, ratio_scheduler="ToCa-ddpm250", reproduce_reference=True)


@pytest.mark.parametrize("case", [name for name, case in load_actions().items() if case.method == "ToCa"])
def test_every_action_and_number_of_tokens_is_the_originals(case: str) -> None:
    golden = load_actions()[case]
    schedule = ToCa(**golden.fields, reproduce_reference=True).schedule(
        len(golden.actions), layout(golden.family, golden.tokens)
    )
    assert [as_recorded(step) for step in schedule.steps] == golden.actions


@pytest.mark.parametrize(
    ("policy", "steps", "flops"),
    [
        (DDIM, 50, 10_232_809_588_736),
        (ToCa(fresh_threshold=3), 50, 11_125_150_171_136),
        (ddpm(4), 250, 43_420_574_210_048),
        (ddpm(1), 250, 103_549_585_270_784),
    ],
    ids=["ddim50", "ddim50-clean", "ddpm250", "ddpm250-N=1"],
)
def test_flops_are_the_published_ones_to_the_last_digit(policy: ToCa, steps: int, flops: int) -> None:
    assert policy.reference_flops(steps, layout(), batch=2) == flops


@pytest.mark.parametrize(
    ("policy", "steps", "full", "flips", "partial", "blocks"),
    [
        (DDIM, 50, 18, [45, 32], 30, 506),
        (ddpm(4), 250, 72, [245, 155], 176, 2018),
        (ddpm(1), 250, 214, None, 35, 5993),
    ],
)
def test_the_reference_flips_after_block_0_where_the_original_does(
    policy, steps, full, flips, partial, blocks
) -> None:
    schedule = policy.schedule(steps, layout())
    found = kinds(schedule)
    flipped = [steps - 1 - k for k, kind in enumerate(found) if kind == "M"]
    assert (found.count("F"), found.count("P"), len(flipped), computed_blocks(schedule)) == (
        full,
        partial,
        steps - full - partial,
        blocks,
    )
    assert flips is None or flipped == flips
    for k in (steps - 1 - index for index in flipped):
        assert as_recorded(schedule.steps[k]) == "F" + "P" * 27


def test_the_reference_has_its_full_steps_where_the_original_does() -> None:
    found = kinds(DDIM.schedule(50, layout()))
    assert [49 - k for k, kind in enumerate(found) if kind == "F"] == [
        49,
        44,
        40,
        36,
        30,
        27,
        24,
        21,
        18,
        16,
        14,
        12,
        10,
        8,
        6,
        4,
        2,
        0,
    ]


def test_by_default_every_block_does_the_same_and_flips_are_full_steps() -> None:
    schedule, reference = ToCa(fresh_threshold=3).schedule(50, layout()), DDIM.schedule(50, layout())
    assert kinds(schedule) == kinds(reference).replace("M", "F")
    assert schedule.kinds() == {"full": 20, "partial": 30}
    assert all(len(set(as_recorded(step))) == 1 for step in schedule.steps)


def test_on_pixart_the_interval_shrinks_with_the_step_and_one_step_flips() -> None:
    policy = ToCa(3, 0.3, ratio_scheduler="ToCa", reproduce_reference=True)
    schedule = policy.schedule(20, layout("PixArt"))
    found = kinds(schedule)
    assert [k for k, kind in enumerate(found) if kind == "F"] == [0, 6, 9, 12, 15, 18]
    assert [k for k, kind in enumerate(found) if kind == "M"] == [4]
    assert computed_blocks(schedule) == 169
    assert kinds(ToCa(3, 0.3, ratio_scheduler="ToCa").schedule(20, layout("PixArt"))) == found.replace(
        "M", "F"
    )


@pytest.mark.parametrize("reference", [False, True])
def test_a_ratio_of_zero_keeps_the_interval_and_still_lets_ages_advance(reference: bool) -> None:
    schedule = ToCa(3, 0.0, reproduce_reference=reference).schedule(50, layout())
    assert [k for k, kind in enumerate(kinds(schedule)) if kind == "F"] == FORA(3).full_steps(50)
    assert {action.code for step in schedule.steps for action in step.actions} == {"C", "R", "P0"}
    pixart = ToCa(3, 0.0, ratio_scheduler="ToCa", reproduce_reference=reference).schedule(
        20, layout("PixArt")
    )
    assert [k for k, kind in enumerate(kinds(pixart)) if kind == "F"] == [0, 3, 6, 9, 12, 15, 18]


def test_on_open_sora_intervals_belong_to_branches_and_the_threshold_divides_the_age_weight_alone() -> None:
    schedule = ToCa(3, 0.1, ratio_scheduler="ToCa").schedule(30, layout("STDiT3", 23850))
    for name, full in {
        "attn": [0, 1, 2, *range(3, 30, 3)],
        "mlp": [0, 1, 2, *range(3, 30, 3)],
        "cross": [0, 1, 2, 6, 12, 18, 24],
    }.items():
        index = next(index for index, branch in enumerate(schedule.layout.branches) if branch.name == name)
        assert [k for k, step in enumerate(schedule.steps) if step.actions[index].code == "C"] == full
    other = ToCa(7, 0.1, ratio_scheduler="ToCa", reproduce_reference=True).schedule(
        30, layout("STDiT3", 23850)
    )
    assert other.steps == schedule.steps
    assert (schedule.selection.age_weight, other.selection.age_weight) == (0.25 / 3, 0.25 / 7)


@pytest.mark.parametrize(
    ("number", "threshold", "length", "interval"),
    [
        (11, 3, 12, 4),
        (49, 3, 50, 5),
        (44, 3, 50, 4),
        (9, 3, 50, 2),
        (10, 9, 50, 2),
        (19, 9, 50, 2),
        (20, 9, 50, 8),
        (0, 1, 250, 1),
    ],
)
def test_the_interval_is_rounded_in_float32_and_two_in_the_sensitive_window(
    number: int, threshold: int, length: int, interval: int
) -> None:
    assert DIT.cycle.interval_after(number, threshold, length) == interval


def test_half_an_interval_rounds_to_even() -> None:
    cycle = AdaptiveCycle(descending=False, pace=Line(0.8, 0.4))
    assert [cycle.interval_after(0, threshold, 10) for threshold in (2, 6)] == [2, 8]


# share of 4096 tokens at fresh_ratio 0.1, T = 10: by hand from docs/methods/toca.md, "How many tokens"
@pytest.mark.parametrize(
    ("scheduler", "family", "step", "layer", "name", "tokens"),
    [
        ("constant", "DiT", 4, 9, "mlp", 409),
        ("constant", "PixArt", 4, 9, "cross", 409),
        ("constant", "STDiT3", 4, 9, "cross", 409),
        ("linear", "DiT", 4, 9, "mlp", 483),
        ("linear", "PixArt", 4, 0, "cross", 483),
        ("linear", "STDiT3", 4, 0, "mlp", 483),
        ("exp", "DiT", 5, 9, "mlp", 388),
        ("exp", "PixArt", 5, 9, "mlp", 388),
        ("linear-mode", "DiT", 4, 9, "mlp", 464),
        ("layerwise", "DiT", 4, 0, "mlp", 778),
        ("layerwise", "DiT", 4, 9, "mlp", 532),
        ("layerwise", "PixArt", 4, 27, "cross", 40),
        ("layerwise", "STDiT3", 4, 9, "mlp", 532),
        ("ToCa-ddim50", "DiT", 4, 0, "mlp", 1146),
        ("ToCa-ddim50", "DiT", 4, 9, "mlp", 1338),
        ("ToCa-ddim50", "DiT", 8, 9, "mlp", 0),
        ("ToCa-ddpm250", "DiT", 4, 9, "mlp", 1400),
        ("linear-layerwise", "DiT", 4, 9, "mlp", 1400),
        ("ToCa", "PixArt", 4, 9, "mlp", 927),
        ("ToCa", "PixArt", 4, 9, "cross", 347),
        ("linear-layerwise", "PixArt", 4, 9, "mlp", 927),
        ("ToCa", "STDiT3", 4, 9, "mlp", 612),
        ("ToCa", "STDiT3", 4, 9, "cross", 0),
    ],
)
def test_a_ratio_schedule_gives_the_share_that_its_formula_gives(
    scheduler, family, step, layer, name, tokens
) -> None:
    schedule = ToCa(ALL_PARTIAL, 0.1, ratio_scheduler=scheduler).schedule(10, layout(family, 4096))
    k = 9 - step if family == "DiT" else step
    for block in (2 * layer, 2 * layer + 1) if family == "STDiT3" else (layer,):
        assert tokens_at(schedule, k, block, name) == tokens


def test_linear_mode_ramps_over_the_steps_of_an_interval() -> None:
    """1.9 - 1.8 * 5/10 + 0.1 * ((5 mod 3)/3 - 0.5) = 1.016667."""
    assert (
        tokens_at(ToCa(3, 0.1, ratio_scheduler="linear-mode").schedule(10, layout("DiT", 4096)), 4, 9, "mlp")
        == 416
    )


@pytest.mark.parametrize(
    ("blocks", "layer", "tokens"), [(12, 0, 778), (12, 11, 40), (3, 1, 409), (1, 0, 778)]
)
def test_layer_factors_span_the_layers_of_other_depths(blocks: int, layer: int, tokens: int) -> None:
    schedule = ToCa(ALL_PARTIAL, 0.1, ratio_scheduler="layerwise").schedule(10, layout("DiT", 4096, blocks))
    assert tokens_at(schedule, 5, layer, "mlp") == tokens


@pytest.mark.parametrize(
    ("scheduler", "tokens", "length", "index", "expected"),
    [
        ("ToCa-ddim50", 256, 50, 48, (0, 0, 0)),
        ("ToCa-ddim50", 256, 50, 38, (0, 0, 0)),
        ("ToCa-ddim50", 256, 50, 37, (1, 1, 2)),
        ("ToCa-ddim50", 256, 50, 30, (21, 27, 32)),
        ("ToCa-ddim50", 256, 50, 20, (50, 63, 75)),
        ("ToCa-ddim50", 256, 50, 10, (78, 99, 118)),
        ("ToCa-ddim50", 256, 50, 1, (104, 131, 156)),
        ("ToCa-ddim50", 1024, 50, 20, (200, 252, 301)),
        ("ToCa-ddim50", 1024, 50, 1, (418, 527, 627)),
        ("ToCa-ddpm250", 256, 250, 248, (48, 26, 5)),
        ("ToCa-ddpm250", 256, 250, 125, (80, 43, 8)),
        ("ToCa-ddpm250", 256, 250, 1, (112, 60, 12)),
    ],
)
def test_tokens_of_dit_layers_0_14_and_27_are_the_specifications(
    scheduler, tokens, length, index, expected
) -> None:
    schedule = ToCa(10 * length, 0.07, ratio_scheduler=scheduler).schedule(length, layout("DiT", tokens))
    assert tuple(tokens_at(schedule, length - 1 - index, layer, "mlp") for layer in (0, 14, 27)) == expected


@pytest.mark.parametrize(
    ("step", "cross", "mlp"), [(1, (133, 33), (256, 88)), (10, (73, 18), (196, 49)), (19, (14, 3), (37, 9))]
)
def test_tokens_of_pixart_layers_0_and_27_are_the_specifications(step, cross, mlp) -> None:
    schedule = ToCa(ALL_PARTIAL, 0.3, ratio_scheduler="ToCa").schedule(20, layout("PixArt"))
    assert tuple(tokens_at(schedule, step, layer, "cross") for layer in (0, 27)) == cross
    assert tuple(tokens_at(schedule, step, layer, "mlp") for layer in (0, 27)) == mlp
    assert tokens_at(schedule, 10, 14, "cross") == 45


def test_tokens_of_open_sora_are_the_specifications() -> None:
    schedule = ToCa(3, 0.1, ratio_scheduler="ToCa").schedule(30, layout("STDiT3", 23850))
    assert {
        (tokens_at(schedule, 4, block, "cross"), tokens_at(schedule, 4, block, "mlp")) for block in range(56)
    } == {(0, 3565)}


@pytest.mark.parametrize("cache_type", [score.value for score in Score])
def test_the_cache_type_is_the_score(cache_type: str) -> None:
    assert ToCa(cache_type=cache_type).schedule(50, layout()).selection.score is Score(cache_type)


@pytest.mark.parametrize(
    ("family", "cell", "bonus"), [("DiT", 2, 0.6), ("PixArt", 4, 0.4), ("STDiT3", 0, 0.0)]
)
def test_the_spatial_bonus_belongs_to_the_host(family: str, cell: int, bonus: float) -> None:
    selection = ToCa(ratio_scheduler="constant").schedule(10, layout(family)).selection
    assert (selection.cell, selection.bonus) == (cell, bonus)


def test_ages_weigh_soft_fresh_weight_over_the_configured_threshold() -> None:
    assert (
        ToCa(fresh_threshold=5, soft_fresh_weight=0.4).schedule(50, layout()).selection.age_weight == 0.4 / 5
    )
    assert ToCa(soft_fresh_weight=0).schedule(50, layout()).selection.age_weight == 0


def test_force_fresh_local_is_what_the_original_does_with_it() -> None:
    local = ToCa(3, force_fresh="local", reproduce_reference=True).schedule(50, layout())
    assert local.steps == DDIM.schedule(50, layout()).steps and local.selection.age_weight == 0
    pixart = ToCa(3, 0.3, ratio_scheduler="ToCa", force_fresh="local", reproduce_reference=True).schedule(
        20, layout("PixArt")
    )
    assert kinds(pixart) == "F" + "P" * 19 and pixart.selection.age_weight == 0
    with pytest.raises(
        ValueError,
        match=(
            "force_fresh: expected 'global', got 'local', with which the original ToCa does not run on STDiT3"
        ),
    ):
        ToCa(ratio_scheduler="ToCa", force_fresh="local", reproduce_reference=True).schedule(
            30, layout("STDiT3")
        )


@pytest.mark.parametrize("policy", [ToCa, DuCa])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fresh_threshold", 0, "fresh_threshold: expected a whole number of steps >= 1, got 0"),
        ("fresh_threshold", 2.5, "fresh_threshold"),
        ("fresh_threshold", True, "fresh_threshold"),
        ("fresh_threshold", "3", "fresh_threshold"),
        ("fresh_ratio", -0.1, r"fresh_ratio: expected a share of tokens in 0\.\.1, got -0\.1"),
        ("fresh_ratio", 7, "fresh_ratio"),
        ("fresh_ratio", float("nan"), "fresh_ratio"),
        ("fresh_ratio", "0.1", "fresh_ratio"),
        ("fresh_ratio", False, "fresh_ratio"),
        ("cache_type", "beauty", "cache_type: expected one of attention, kv-norm, .*, got 'beauty'"),
        ("cache_type", "k-norm", "a score of FLUX"),
        ("cache_type", None, "cache_type"),
        (
            "ratio_scheduler",
            "cosine",
            "ratio_scheduler: 'cosine' is a choice of the originals that they never implemented",
        ),
        ("ratio_scheduler", "square", "ratio_scheduler: expected one of constant, .*, got 'square'"),
        ("soft_fresh_weight", -1, "soft_fresh_weight: expected a number >= 0"),
        ("soft_fresh_weight", float("inf"), "soft_fresh_weight"),
        ("soft_fresh_weight", "x", "soft_fresh_weight"),
        (
            "force_fresh",
            "local",
            (
                "force_fresh: expected 'global', got 'local': .* soft_fresh_weight=0; .*"
                " reproduce_reference=True"
            ),
        ),
        ("force_fresh", "none", "force_fresh: expected 'global' .*, got 'none'"),
        ("reproduce_reference", "yes", "reproduce_reference: expected True or False, got 'yes'"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_meant(policy, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**{field: value})


@pytest.mark.parametrize(
    ("scheduler", "family", "own"),
    [
        ("ToCa", "DiT", "'ToCa-ddim50' or 'ToCa-ddpm250'"),
        ("ToCa-ddim50", "PixArt", "'ToCa'"),
        ("ToCa-ddpm250", "STDiT3", "'ToCa'"),
        ("linear-layerwise", "STDiT3", "'ToCa'"),
    ],
)
def test_a_ratio_schedule_of_another_host_is_refused_with_this_hosts_own(
    scheduler: str, family: str, own: str
) -> None:
    with pytest.raises(
        ValueError,
        match=(
            f"ratio_scheduler: expected one of constant, .* for ToCa on {family} .its authors use {own}., got"
            f" '{scheduler}'"
        ),
    ):
        ToCa(ratio_scheduler=scheduler).schedule(50, layout(family))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Layout("UViT", 256, 1152, 16, layout().branches),
            "layout.family: ToCa has rules for DiT, PixArt, STDiT3, got 'UViT'",
        ),
        (
            Layout("DiT", 256, 1152, 16, layout("PixArt").branches),
            (
                "layout: the rules for DiT are about blocks with branches attn, mlp, got branches attn,"
                " cross, mlp in 28 blocks"
            ),
        ),
        (layout("DiT", 0), "layout.tokens: expected the number of tokens of a sample"),
        (
            layout("DiT", 240),
            (
                "layout.tokens: the spatial bonus on DiT needs a square grid whose side is a multiple of 2,"
                " got 240"
            ),
        ),
        (layout("DiT", 225), "multiple of 2, got 225"),
    ],
)
def test_a_host_that_the_rules_do_not_fit_is_refused(bad: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToCa().schedule(50, bad)


def test_an_odd_number_of_open_sora_blocks_and_a_grid_that_pixarts_cells_do_not_tile_are_refused() -> None:
    with pytest.raises(
        ValueError, match="layout: STDiT3 has 2 blocks a layer, expected a multiple of that, got 55 blocks"
    ):
        ToCa(ratio_scheduler="ToCa").schedule(30, layout("STDiT3", blocks=55))
    with pytest.raises(ValueError, match="side is a multiple of 4, got 100 tokens"):
        ToCa(ratio_scheduler="ToCa").schedule(20, layout("PixArt", 100))


def test_a_bad_number_of_steps_is_named_and_the_formula_is_dits_alone() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        ToCa().schedule(0, layout())
    with pytest.raises(NotImplementedError, match="formula for DiT alone, got PixArt"):
        ToCa(ratio_scheduler="ToCa").reference_flops(20, layout("PixArt"), 2)


def test_settings_have_the_names_order_and_defaults_of_the_method() -> None:
    assert [(field.name, getattr(ToCa(), field.name)) for field in fields(ToCa)] == [
        ("fresh_threshold", 4),
        ("fresh_ratio", 0.07),
        ("cache_type", "attention"),
        ("ratio_scheduler", "ToCa-ddim50"),
        ("soft_fresh_weight", 0.25),
        ("force_fresh", "global"),
        ("reproduce_reference", False),
    ]
    assert fastcache.policies.POLICIES["toca"] is fastcache.ToCa


def test_a_schedule_with_its_selection_survives_json() -> None:
    schedule = DDIM.schedule(50, layout())
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert (schedule.policy, schedule.fields) == ("ToCa", DDIM.fields())


def test_one_step_is_full() -> None:
    assert kinds(ToCa().schedule(1, layout())) == "F"


def test_a_drawing_shades_refreshes_by_their_share_of_tokens(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from fastcache.plan.drawing import _shade

    schedule = DDIM.schedule(50, layout())
    schedule.draw(tmp_path / "steps.png")
    found = {
        "#{:02x}{:02x}{:02x}".format(*colour)
        for _, colour in image.open(tmp_path / "steps.png").convert("RGB").getcolors(1 << 20)
    }
    drawn = [_shade(tokens / 256) for tokens in (0, 21, 156)]
    assert len(set(drawn)) == 3 and set(drawn) <= found
