"""The baselines of the benchmarks compute what the originals compute, in as many operators as the originals
take."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_data import CFG_SCALE, TOLERANCE, golden_model, load_case, relative_error
from hosts import STEPS, assert_close, inputs, small_dit
from test_golden_token_refresh import POLICIES, policy_of

import fastcache
from benchmarks.originals import Original, choose
from fastcache.engine.record import OperatorCount
from fastcache.models import DiT
from fastcache.schedule import Selection

LAYOUT = lambda model: fastcache.hosts.recognise(model).layout()
OURS = {
    "toca": fastcache.ToCa(3, 0.3),
    "toca, flips": fastcache.ToCa(3, 0.3, reproduce_reference=True),
    "toca, kv-norm": fastcache.ToCa(3, 0.3, cache_type="kv-norm", soft_fresh_weight=0.0),
    "duca": fastcache.DuCa(3, 0.3),
    "taylorseer": fastcache.TaylorSeer(3, 2),
    "taylorseer, order 4": fastcache.TaylorSeer(2, 4),
    "taylorseer, order 0": fastcache.TaylorSeer(3, 0, first_enhance=1),
    "fora": fastcache.FORA(3),
    "duca, kv-norm, flips": fastcache.DuCa(4, 0.3, cache_type="kv-norm", reproduce_reference=True),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def generated(model: DiT, original: Original, steps: int = STEPS) -> tuple[list[torch.Tensor], list[int]]:
    """Outputs and operators of every step."""
    outputs, operators = [], []
    with original:
        for step in range(steps):
            original.step = step
            with OperatorCount() as counter:
                outputs.append(model(*inputs(step)))
            operators.append(counter.count)
    return outputs, operators


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.slow
def test_original_toca_and_duca_equal_the_recorded_outputs(name: str) -> None:
    model, case = golden_model(), load_case(name)
    calls = list(case.calls())
    with Original(model, policy_of(name).schedule(len(calls), LAYOUT(model))) as original:
        errors = []
        for call in calls:
            original.step = call.step
            found = model.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE)
            errors.append(relative_error(found, call.out))
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("policy", OURS.values(), ids=OURS)
def test_originals_equal_ours(policy: fastcache.Policy) -> None:
    model = small_dit()
    original = Original(model, policy.schedule(STEPS, LAYOUT(model)))
    outputs, _ = generated(model, original)
    again, _ = generated(model, original)
    assert_close(again, outputs, 1e-12)
    with fastcache.accelerate(model, policy, STEPS, calls_per_step=1):
        assert_close([model(*inputs(step)) for step in range(STEPS)], outputs)


def by_block(policy: fastcache.Policy, steps: int) -> dict[str, float]:
    """Operators that a block takes, by kind of step: the difference between two depths."""
    counts = []
    for depth in (2, 6):
        model = small_dit(depth=depth)
        schedule = policy.schedule(steps, LAYOUT(model))
        counts.append(generated(model, Original(model, schedule), steps)[1])
    kinds = [step.kind for step in schedule.steps]
    return {kind: (deep - shallow) / 4 for kind, shallow, deep in zip(kinds, *counts, strict=True)}


def test_blocks_of_the_originals_take_as_many_operators_as_the_specification_counts() -> None:
    toca = by_block(fastcache.ToCa(3, 0.3), 12)
    assert 30 < toca["partial"] <= 42 - 7  # 7 of 42 are the scalars that were left out
    assert 20 < toca["full"] <= 38
    duca = by_block(fastcache.DuCa(3, 0.3, cache_type="kv-norm"), 12)
    assert 30 < duca["partial"] <= 46 - 7 and duca["skip"] == 0
    assert by_block(fastcache.TaylorSeer(), 22)["forecast"] == 36


def test_the_worked_example_of_the_specification_chooses_its_tokens() -> None:
    received = torch.tensor([[4.0, 1, 2, 3, 1, 1, 9, 1, 5, 2, 1, 1, 1, 1, 1, 8]])
    ages = torch.zeros(1, 16, dtype=torch.int32)
    ages[0, [1, 10, 11]], ages[0, 4] = 1, 2
    before = ages.clone()
    selection, fields = (
        Selection("attention", 0.25 / 3, 2, 0.6),
        {"soft_fresh_weight": 0.25, "fresh_threshold": 3},
    )
    chosen = choose(torch.nn.functional.normalize(received, dim=-1), ages, 4, selection, fields)
    assert chosen.tolist() == [[6, 15, 8, 0]]
    expected = before + 1
    expected[0, chosen[0]] = 0
    assert torch.equal(ages, expected)
