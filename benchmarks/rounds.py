"""One contender under pytest-benchmark, on rotating buffers."""

import itertools
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bandwidth import Bandwidth
from benchmarks.forms import NotMeasured, Prepared
from benchmarks.providers import Provider

SECONDS, LEAST, MOST = 1.0, 5, 100


def benchmark_provider(
    benchmark: BenchmarkFixture, prepared: Prepared, provider: Provider, bandwidth: Bandwidth
) -> None:
    """Check the values, then time; bytes, GB/s and share of the copy bandwidth go into `extra_info`."""
    case = prepared.case
    try:
        calls, error = prepared.bound(provider)
    except NotMeasured as reason:
        pytest.skip(str(reason))
    begun = time.perf_counter()
    calls[-1]()
    rounds = min(MOST, max(LEAST, int(SECONDS / (time.perf_counter() - begun))))
    turns = itertools.cycle(calls)
    benchmark.group = case.name
    benchmark.pedantic(
        lambda call: call(), setup=lambda: ((next(turns),), {}), rounds=rounds, warmup_rounds=1
    )
    benchmark.extra_info |= {
        "bytes": case.min_bytes,
        "cache": prepared.cache,
        "buffers": len(calls),
        "error": error,
    }
    if benchmark.stats is not None:  # None under --benchmark-disable
        gbps = 1e-9 * case.min_bytes / benchmark.stats.stats.median
        benchmark.extra_info |= {"gbps": gbps, "share_of_copy": gbps / bandwidth.copy_gbps}
