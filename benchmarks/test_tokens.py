"""Partial blocks and choices of tokens under pytest-benchmark; a group is a case."""

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.forms import NotMeasured
from benchmarks.providers import Provider
from benchmarks.token_cases import BlockCase, ChoiceCase, block_cases, choice_cases
from benchmarks.token_choices import CONTENDERS, bound, make_choice
from benchmarks.tokens import BLOCK_PROVIDERS, MOST_FLOPS, PreparedBlock, binders

CASES = [case for case in block_cases() if case.flops <= MOST_FLOPS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def prepared(request: pytest.FixtureRequest, device: torch.device) -> PreparedBlock:
    return PreparedBlock(request.param, device)


@pytest.mark.parametrize("provider", BLOCK_PROVIDERS, ids=lambda provider: provider.value.replace(" ", "-"))
def test_block(benchmark: BenchmarkFixture, prepared: PreparedBlock, provider: Provider) -> None:
    case: BlockCase = prepared.case
    try:
        calls, error = prepared.bound_by(
            provider.value, binders()[provider], may_fail=provider is Provider.COMPILED
        )
    except NotMeasured as reason:
        pytest.skip(str(reason))
    turns = itertools.cycle(calls)
    benchmark.group = case.name
    benchmark.extra_info |= {
        "bytes": case.min_bytes,
        "flops": case.flops,
        "error": error,
        "cache": prepared.cache,
    }
    benchmark.pedantic(lambda call: call(), setup=lambda: ((next(turns),), {}), rounds=9, warmup_rounds=1)


@pytest.mark.parametrize("name", CONTENDERS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("case", choice_cases(), ids=lambda case: case.name)
def test_choice(benchmark: BenchmarkFixture, case: ChoiceCase, name: str, device: torch.device) -> None:
    benchmark.group = case.name
    benchmark.pedantic(bound(name, make_choice(case, device)), rounds=9, warmup_rounds=1)
