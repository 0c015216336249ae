"""Partial blocks and choices of tokens: bytes, values and guards. No test here asserts a speed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import token_choices  # noqa: E402
from benchmarks.correctness import WrongValues  # noqa: E402
from benchmarks.machine import threads  # noqa: E402
from benchmarks.providers import Provider  # noqa: E402
from benchmarks.timing import Effort  # noqa: E402
from benchmarks.token_cases import SIZES, TINY, BlockCase, ChoiceCase, Work, block_cases, choice_cases  # noqa: E402
from benchmarks.token_choices import CONTENDERS, SELECTION, make_choice  # noqa: E402
from benchmarks.token_sequences import make_inputs, make_mlp, ours  # noqa: E402
from benchmarks.tokens import (
    MLP_ALONE,
    PreparedBlock,
    binders,
    chosen_by,
    measure_block,
    measure_choice,
    measure_tokens,
)  # noqa: E402
from fastcache.backends.eager_tokens import select_tokens_  # noqa: E402
from fastcache.models.dit import Mlp  # noqa: E402
from fastcache.report import OperatorCount  # noqa: E402

CPU = torch.device("cpu")
ONCE = Effort(0.0, 1, 1)
each_work = pytest.mark.parametrize("work", Work, ids=lambda work: work.value)


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), threads(1):
        yield


def test_least_bytes_are_those_counted_by_hand() -> None:
    # x [2, 16, 32] in float32 has 4,096 bytes, 4 rows of both samples 1,024, a vector 256, a slot map 128
    assert BlockCase(Work.STREAM, TINY, 0.25).min_bytes == 4 * 4096 + 2 * 1024 + 4 * 256 + 2 * 128
    weights = sum(parameter.numel() for parameter in Mlp(32, 128).parameters())
    block = BlockCase(Work.BLOCK, TINY, 0.25)
    assert (
        block.weight_bytes == 4 * weights
        and block.min_bytes == BlockCase(Work.STREAM, TINY, 0.25).min_bytes + 4 * weights
    )
    assert block.flops == 2 * (2 * 4) * 2 * 32 * 128 and BlockCase(Work.STREAM, TINY, 0.25).flops == 0
    assert ChoiceCase(TINY, 0.2, 3).min_bytes == 3 * 2 * 16 * 4 * 4


def test_cases_span_one_to_sixty_percent_and_256_to_24k_tokens() -> None:
    cases = block_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.share for case in cases} >= {0.01, 0.6} and {case.size.tokens for case in cases} >= {
        256,
        24336,
    }
    assert all(
        size.tokens == round(size.tokens**0.5) ** 2 and size.tokens**0.5 % SELECTION.cell == 0
        for size in SIZES
    )
    assert [len(case.counts) for case in choice_cases()] == [28] * len(SIZES) and choice_cases()[
        0
    ].counts == sorted(choice_cases()[0].counts)


@each_work
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("provider", binders("eager"), ids=lambda provider: provider.value)
def test_contenders_of_a_block_agree_with_float64(provider: Provider, dtype: torch.dtype, work: Work) -> None:
    bind = binders("eager")[provider]
    for share in (0.01, 0.25, 1.0):
        PreparedBlock(BlockCase(work, TINY, share, dtype), CPU, max_copies=1).bound_by(
            provider.value, bind, may_fail=False
        )


@each_work
def test_a_block_that_leaves_out_a_part_is_refused(work: Work) -> None:
    prepared = PreparedBlock(BlockCase(work, TINY, 0.25), CPU, max_copies=1)
    stale = lambda inputs: lambda: (inputs.x, ours(inputs)()[1])  # noqa: E731
    with pytest.raises(WrongValues, match="cheat is off by"):
        prepared.bound_by("cheat", stale, may_fail=False)
    wrong = lambda inputs: lambda: (ours(inputs)()[0], inputs.fresh)  # noqa: E731
    with pytest.raises(WrongValues, match="cheat is off by"):
        prepared.bound_by("cheat", wrong, may_fail=False)


def test_our_block_is_one_launch_and_the_gemms() -> None:
    case = BlockCase(Work.BLOCK, TINY, 0.25)
    call = ours(make_inputs(case, CPU, make_mlp(case, CPU)))
    with OperatorCount() as counter:
        call()
    assert counter.count == 4  # the launch, two GEMMs, GELU


def test_one_graph_of_torch_compile_serves_every_number_of_tokens() -> None:
    bind = binders("eager")[Provider.COMPILED]
    torch._dynamo.utils.counters.clear()
    for share in (0.2, 0.3, 0.6):
        PreparedBlock(BlockCase(Work.BLOCK, TINY, share), CPU, max_copies=1).bound_by(
            "torch.compile", bind, may_fail=False
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_of_a_choice_choose_what_the_definition_chooses(name: str) -> None:
    case = ChoiceCase(TINY, 0.3, 5)
    own, exact = make_choice(case, CPU), make_choice(case, CPU)
    slots, _ = select_tokens_(
        exact.scores.view(-1, 16),
        exact.ages.view(-1, 16),
        exact.device_counts,
        16,
        SELECTION.age_weight,
        True,
        4,
        SELECTION.cell,
        SELECTION.bonus,
    )
    assert torch.equal(chosen_by(CONTENDERS[name], own), (slots >= 0).view_as(own.ages))
    assert torch.equal(own.ages, exact.ages)


def test_rows_of_a_choice_count_operators_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.provider: row for row in measure_choice(ChoiceCase(TINY, 0.3), CPU, ONCE)}
    assert rows["fastcache"].operators == 1 and rows["naive"].operators >= 15 * 28
    assert rows["naive"].vs_naive == 1 and rows["topk per layer"].vs_topk == 1
    assert rows["fastcache"].against(10.0).floor_us == pytest.approx(rows["fastcache"].bytes / 10e3)
    monkeypatch.setitem(token_choices.CONTENDERS, "naive", lambda inputs: inputs.ages.zero_())
    with pytest.raises(WrongValues, match="naive chooses otherwise"):
        measure_choice(ChoiceCase(TINY, 0.3), CPU, ONCE)


def test_rows_of_a_block_have_ratios_and_the_mlp_alone_beside_them() -> None:
    contenders = {
        provider: bind for provider, bind in binders("eager").items() if provider is not Provider.COMPILED
    }
    rows, absent = measure_block(BlockCase(Work.BLOCK, TINY, 0.25), CPU, ONCE, contenders, 1)
    assert [row.provider for row in rows] == ["naive", "best eager", "fastcache", MLP_ALONE] and absent == []
    naive, own = rows[0], rows[2]
    assert (
        own.vs_naive == naive.timing.median_us / own.timing.median_us
        and own.vs_compile is None
        and rows[3].vs_naive is None
    )
    assert own.rows == 4 and own.against(2.0).floor_us == pytest.approx(own.bytes / 2e3)


def test_a_block_beyond_time_or_memory_is_absent_with_the_reason() -> None:
    large = BlockCase(Work.BLOCK, SIZES[-1], 0.6)
    rows, [absent] = measure_block(large, CPU, ONCE, {})
    assert rows == [] and "GFLOP a call" in absent.reason
    with pytest.raises(Exception, match=r"needs \d+\.\d GB of memory, 0\.0 GB are free"):
        PreparedBlock(large, CPU, free=1000)


def test_the_part_measures_every_case() -> None:
    blocks, choices, absent = measure_tokens(
        block_cases((TINY,), (0.25, 0.6)),
        choice_cases((TINY,)),
        CPU,
        ONCE,
        (Provider.NAIVE, Provider.OURS),
        1,
    )
    assert {(row.work, row.rows, row.provider) for row in blocks} == {
        (work.value, rows, who)
        for work in Work
        for rows in (4, 9)
        for who in ("naive", "fastcache", *([MLP_ALONE] if work is Work.BLOCK else []))
    }
    assert len(choices) == len(CONTENDERS) and absent == ()
