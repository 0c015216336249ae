"""FORA's step rule and the authors' FLOP formula (docs/methods/fora.md, "Conformance")."""

import pytest

from fastcache import FORA
from fastcache.policies.reference import full_block_flops
from fastcache.schedule import Branch, Layout

DIT_XL_2 = Layout(
    "DiT", 256, 1152, 16, tuple(Branch(index // 2, ("attn", "mlp")[index % 2], 1) for index in range(56))
)


@pytest.mark.parametrize(
    ("steps", "interval", "full"),
    [(50, 3, 18), (250, 3, 84), (20, 3, 8), (50, 2, 26), (50, 5, 11), (100, 7, 16), (50, 1, 50), (1, 3, 1)],
)
def test_number_of_full_steps_is_the_originals(steps: int, interval: int, full: int) -> None:
    assert len(FORA(interval).full_steps(steps)) == full


def test_the_first_two_steps_are_both_full_unless_the_interval_divides_the_last_index() -> None:
    assert FORA(3).full_steps(50) == [0, *range(1, 50, 3)]
    assert FORA(3).full_steps(250) == list(range(0, 250, 3))
    assert FORA(2).full_steps(50) == [0, *range(1, 50, 2)]


def test_every_step_is_full_or_reuse_in_all_branches() -> None:
    schedule = FORA(3).schedule(50, DIT_XL_2)
    assert schedule.kinds() == {"full": 18, "reuse": 32}
    assert [k for k, step in enumerate(schedule.steps) if step.kind == "full"] == FORA(3).full_steps(50)
    assert schedule.policy == "FORA" and schedule.fields == {"interval": 3}


def test_reference_flops_equal_the_published_figures() -> None:
    assert 50 * 28 * full_block_flops(DIT_XL_2, 2) == 23_735_281_203_200  # 23.74 T, uncached
    assert FORA(3).reference_flops(50, DIT_XL_2, 2) / 1e12 == pytest.approx(8.56, abs=0.005)
    assert FORA(1).reference_flops(50, DIT_XL_2, 2) == 23_735_281_203_200


@pytest.mark.parametrize("interval", [0, -3, 2.0, "3", True])
def test_a_bad_interval_is_named(interval) -> None:
    with pytest.raises(ValueError, match="interval"):
        FORA(interval)
