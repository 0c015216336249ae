"""Everything under pytest-benchmark; a group is a case, or a method on a model."""

import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import FLAGSHIP, cases, token_cases
from benchmarks.contest import AnyCase, NotMeasured, Prepared, entrants, sequences_of
from benchmarks.generations import CPU, FORA_3, HOST, METHOD_WAYS, METHODS, MODEL_SIZES, Contest, Entrant
from benchmarks.machine import kept_heap, threads
from benchmarks.tokens import dispatch_case, operator_cases

SECONDS, LEAST, MOST = 1.0, 5, 100
CASES = [dispatch_case(), *cases(), *operator_cases(), *token_cases()]
NAMED = [(case, name, "") for case in CASES for name in (*sequences_of(case).contenders, "torch.compile")]
NAMED += [(FLAGSHIP, name, "flagship-") for case, name, _ in NAMED if case == FLAGSHIP]
GENERATING = [HOST, *(Entrant(method, way) for method in (FORA_3, *METHODS) for way in METHOD_WAYS)]


@pytest.fixture(scope="session", autouse=True)
def equal_conditions() -> Iterator[None]:
    """As in benchmarks.run: no gradients, and freed memory kept."""
    with torch.no_grad(), kept_heap():
        yield


@pytest.mark.parametrize(
    ("case", "name", "flagship"),
    [pytest.param(*one, id=f"{one[2]}{one[0].name}-{one[1].replace(' ', '-')}") for one in NAMED],
)
def test_case(benchmark: BenchmarkFixture, case: AnyCase, name: str, flagship: str) -> None:
    """Check the values, then time; the flagship on one thread."""
    with threads(1 if flagship else torch.get_num_threads()):
        try:
            prepared = Prepared(case, CPU)
            bound = prepared.bound(next(one for one in entrants(prepared.sequences) if one.name == name))
        except NotMeasured as reason:
            pytest.skip(str(reason))
        begun = time.perf_counter()
        bound.calls[-1]()
        rounds = min(MOST, max(LEAST, int(SECONDS / (time.perf_counter() - begun))))
        turns, benchmark.group = itertools.cycle(bound.calls), flagship + case.name
        turn = lambda: ((next(turns),), {})
        benchmark.pedantic(lambda call: call(), setup=turn, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info |= {"bytes": case.min_bytes, "cache": prepared.cache, "error": bound.error}


@pytest.mark.parametrize("entrant", GENERATING, ids=lambda entrant: entrant.name.replace(" ", "-"))
@pytest.mark.parametrize("size", MODEL_SIZES, ids=lambda size: size.name.replace(" ", "-"))
def test_generation(benchmark: BenchmarkFixture, size, entrant: Entrant) -> None:
    with torch.inference_mode():
        contest = Contest(size, [entrant.method] if entrant.method else [])
        benchmark.group = f"{entrant.method.name if entrant.method else 'uncached'} on {size.name}"
        benchmark.pedantic(contest.generate, args=(entrant,), rounds=3, warmup_rounds=1)
