"""Times of GPU work without the host: calls on rotating buffers, captured in one CUDA graph and replayed.

On a CPU there is no graph, and a replay runs the calls; that serves rehearsals, not measurements.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.timing import Effort, Timing, measure

Call = Callable[[], object]
GRAPH_US = 500.0  # of work in a graph, so that its launch and the events around it do not count
LAUNCH_US = 2.0  # the least that a call takes
MOST_CALLS = 64
HOST_CALLS, HOST_ROUNDS = 20, 7  # fewer launches than the queue to the GPU holds


@dataclass
class Replay:
    """Calls that are made together. results: kept, so that every call writes memory of its own."""

    run: Callable[[], object]
    calls: int
    results: list[object]


def captured(calls: Sequence[Call], device: torch.device, ideal_us: float) -> Replay:
    """A graph that makes every call equally often, in turn, until it has about GRAPH_US of work.

    Equally often: else a replay would begin with buffers that the one before has just read.
    ideal_us: what a call would take at the speed of memory. The calls must have run before.
    """
    wanted = max(2, min(MOST_CALLS, round(GRAPH_US / max(ideal_us, LAUNCH_US))))
    count = len(calls) * -(-wanted // len(calls))
    turns = [calls[turn % len(calls)] for turn in range(count)]
    results: list[object] = []
    if device.type != "cuda":
        return Replay(lambda: [call() for call in turns], count, results)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results += [call() for call in turns]
    return Replay(graph.replay, count, results)


def measure_replays(replays: Mapping[str, Replay], effort: Effort, device: torch.device) -> dict[str, Timing]:
    """Microseconds of one call of each contender; they take turns, replay by replay."""
    found = measure({name: [replay.run] for name, replay in replays.items()}, effort, device)
    return {name: scaled(timing, replays[name].calls) for name, timing in found.items()}


def scaled(timing: Timing, calls: int) -> Timing:
    """Of one of `calls` calls."""
    return replace(
        timing,
        **{name: getattr(timing, name) / calls for name in ("median_us", "p10_us", "p90_us", "best_us")},
    )


def host_us(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds that the host spends on a call: median over a few rounds, each on an idle GPU."""
    rounds = []
    for _ in range(HOST_ROUNDS):
        synchronised(device)
        begun = time.perf_counter()
        for turn in range(HOST_CALLS):
            calls[turn % len(calls)]()
        rounds.append(1e6 * (time.perf_counter() - begun) / HOST_CALLS)
    synchronised(device)
    return statistics.median(rounds)


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels and memory operations that a call puts on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import DeviceType, ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory that a call takes beyond what it found, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def synchronised(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
