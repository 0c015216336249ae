"""Everything under pytest-benchmark; a group is a case, an autograd mode, or a method on a model."""

import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import FLAGSHIP, TOKEN_SIZES, ChoiceCase, block_cases, cases
from benchmarks.contest import AnyCase, NotMeasured, Prepared, entrants, sequences_of
from benchmarks.dispatch import MODES, tiny_calls
from benchmarks.generations import (
    CPU,
    FORA_3,
    METHOD_WAYS,
    METHODS,
    MODEL_SIZES,
    Contest,
    Entrant as Generating,
    Way,
    checked,
)
from benchmarks.machine import Bandwidth, kept_heap, measure_bandwidth, threads
from benchmarks.tokens import operator_cases

SECONDS, LEAST, MOST = 1.0, 5, 100
CASES = [*cases(), *operator_cases(), *map(ChoiceCase, TOKEN_SIZES), *block_cases()]
HOST = Generating(None, Way.HOST)


@pytest.fixture(scope="session", autouse=True)
def equal_conditions() -> Iterator[None]:
    """As in benchmarks.run: no gradients, and freed memory kept."""
    with torch.no_grad(), kept_heap():
        yield


@pytest.fixture(scope="session")
def bandwidth() -> Bandwidth:
    return measure_bandwidth(CPU)


@pytest.fixture(scope="module")
def prepared() -> dict[AnyCase, Prepared]:
    """The buffers of the last case, shared by its contenders."""
    return {}


def everyone(case: AnyCase) -> list[str]:
    names = [*sequences_of(case).contenders]
    return [*names[:2], "torch.compile", *names[2:]]


def named(found: list[AnyCase], prefix: str = "") -> list:
    return [
        pytest.param(case, name, id=f"{prefix}{case.name}-{name.replace(' ', '-')}")
        for case in found
        for name in everyone(case)
    ]


def timed(benchmark: BenchmarkFixture, kept: dict, case: AnyCase, name: str, copy_gbps: float) -> None:
    """Check the values, then time; bytes, GB/s and share of the copy bandwidth go into `extra_info`."""
    try:
        if case not in kept:
            kept.clear()
            kept[case] = Prepared(case, CPU)
        wanted = [one for one in entrants(kept[case].sequences) if one.name == name]
        bound = kept[case].bound(wanted[0])
    except NotMeasured as reason:
        pytest.skip(str(reason))
    begun = time.perf_counter()
    bound.calls[-1]()
    rounds = min(MOST, max(LEAST, int(SECONDS / (time.perf_counter() - begun))))
    turns, benchmark.group = itertools.cycle(bound.calls), case.name
    benchmark.pedantic(
        lambda call: call(), setup=lambda: ((next(turns),), {}), rounds=rounds, warmup_rounds=1
    )
    benchmark.extra_info |= {"bytes": case.min_bytes, "cache": kept[case].cache, "error": bound.error}
    if benchmark.stats is not None:  # None under --benchmark-disable
        gbps = 1e-9 * case.min_bytes / benchmark.stats.stats.median
        benchmark.extra_info |= {"gbps": gbps, "share_of_copy": gbps / copy_gbps}


@pytest.mark.parametrize(("case", "name"), named(CASES))
def test_case(
    benchmark: BenchmarkFixture, prepared: dict, case: AnyCase, name: str, bandwidth: Bandwidth
) -> None:
    timed(benchmark, prepared, case, name, bandwidth.copy_gbps)


@pytest.mark.parametrize(("case", "name"), named([FLAGSHIP], "flagship-"))
def test_flagship_on_one_thread(
    benchmark: BenchmarkFixture, prepared: dict, case: AnyCase, name: str
) -> None:
    with threads(1):
        timed(benchmark, prepared, case, name, measure_bandwidth(CPU).copy_gbps)


@pytest.mark.parametrize("call", tiny_calls(CPU))
@pytest.mark.parametrize("mode", MODES)
def test_dispatch(benchmark: BenchmarkFixture, mode: str, call: str) -> None:
    benchmark.group = f"dispatch: {mode}"
    with threads(1), MODES[mode]():
        benchmark(tiny_calls(CPU)[call])


@pytest.fixture(scope="module", params=MODEL_SIZES, ids=lambda size: size.name.replace(" ", "-"))
def contest(request: pytest.FixtureRequest) -> Iterator[Contest]:
    """A model on which all methods were found to agree with their originals."""
    with torch.inference_mode():
        contest = Contest(request.param, (FORA_3, *METHODS))
        checked(contest, [Generating(method, way) for method in (FORA_3, *METHODS) for way in METHOD_WAYS])
        yield contest


@pytest.mark.parametrize("way", METHOD_WAYS, ids=lambda way: way.name.lower())
@pytest.mark.parametrize("method", (FORA_3, *METHODS), ids=lambda method: method.name)
def test_method(benchmark: BenchmarkFixture, contest: Contest, method, way: Way) -> None:
    benchmark.group = f"{method.name} on {contest.size.name}"
    benchmark.pedantic(contest.generate, args=(Generating(method, way),), rounds=3)


def test_uncached(benchmark: BenchmarkFixture, contest: Contest) -> None:
    benchmark.group = f"uncached on {contest.size.name}"
    benchmark.pedantic(contest.generate, args=(HOST,), rounds=3)
