"""tokens.png: what is recorded of a run, and what the drawing shows of it."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")

from fastcache.glyphs import load_glyph_dit
from fastcache.policies import FORA, DuCa, ToCa
from fastcache.workshop.studies.comparison import Sampler
from fastcache.workshop.studies.tokens import (
    TokenRecord,
    draw_tokens,
    overlaid,
    record_tokens,
    tokens_computed,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SAMPLER = Sampler(steps=8, batch_size=4)


@pytest.fixture(scope="module")
def record() -> TokenRecord:
    return record_tokens(load_glyph_dit(), ToCa(fresh_threshold=3), SAMPLER, [0, 17])


def test_shares_add_up_to_the_planned_tokens_of_every_step(record):
    partial = [step for step, plan in enumerate(record.schedule.steps) if plan.kind == "partial"]
    assert record.shares and set(record.shares) <= set(partial)
    for step in partial:
        counts = tokens_computed(record.schedule.steps[step], record.schedule)
        if step not in record.shares:
            assert not any(counts)
            continue
        shares = record.shares[step]
        assert shares.shape == (2, 64) and shares.min() >= 0 and shares.max() <= 1
        assert shares.sum(1) == pytest.approx(np.full(2, np.mean(counts)), rel=1e-5)


def test_recording_gives_the_pictures_of_the_policy(record):
    from fastcache.workshop.glyphs.dataset import to_pixels

    usual = to_pixels(SAMPLER.run(load_glyph_dit(), [0, 17], ToCa(fresh_threshold=3)).pictures)
    assert np.abs(usual.astype(int) - record.pictures).max() <= 1


def test_a_full_step_computes_all_tokens_and_a_skipped_one_none(record):
    schedule = record.schedule
    assert set(tokens_computed(schedule.steps[0], schedule)) == {64}
    skipping = DuCa(fresh_threshold=3).schedule(8, schedule.layout)
    skipped = next(plan for plan in skipping.steps if plan.skip)
    assert set(tokens_computed(skipped, skipping)) == {0}
    plain = FORA(interval=2).schedule(8, schedule.layout)
    assert [set(tokens_computed(plan, plain)) for plan in plain.steps[:3]] == [{64}, {64}, {0}]


def test_shown_steps_are_spread_from_the_first_to_the_last():
    record = TokenRecord(
        np.zeros((1, 32, 32, 3), np.uint8), None, {step: np.zeros((1, 64)) for step in range(10, 40, 2)}
    )
    assert (
        record.shown_steps(3) == [10, 24, 38]
        and record.shown_steps(8) == list(range(10, 40, 4))
        and record.shown_steps(20) == list(range(10, 40, 2))
    )


def test_the_overlay_tints_the_cells_of_refreshed_tokens_alone():
    picture = np.full((32, 32, 3), 100, np.uint8)
    shares = np.zeros(64)
    shares[9] = 1.0  # second row, second column
    drawn = overlaid(picture, shares)
    tinted = drawn[..., 0] > drawn[..., 2]
    expected = np.zeros((32, 32), bool)
    expected[4:8, 4:8] = True
    assert (tinted == expected).all()


def test_stronger_shares_are_brighter():
    picture = np.full((1, 1, 3), 90, np.uint8)
    brightness = [int(overlaid(picture, np.array([share])).sum()) for share in np.linspace(0, 1, 9)]
    assert brightness == sorted(brightness) and len(set(brightness)) == 9


def test_a_policy_without_refreshed_tokens_is_drawn_too(tmp_path: Path, record):
    plain = record_tokens(load_glyph_dit(), FORA(interval=2), Sampler(steps=4), [0])
    assert plain.shares == {}
    draw_tokens({"ToCa": record, "FORA": plain}, tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes()[:4] == b"\x89PNG"
