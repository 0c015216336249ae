"""Medians of contenders that take turns, so that whatever slows the machine slows all of them alike.

Every time is taken twice: wall time, and the CPU time of the thread (of the process, where PyTorch has
several), which a neighbour on the machine does not move. GPU work is timed in CUDA graphs, without the host;
on a CPU a replay runs the calls, which serves rehearsals and no measurement.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
GRAPH_US = 500.0  # of work in a graph, so that its launch and the events around it do not count
LAUNCH_US = 2.0  # the least that a call takes
MOST_CALLS = 64
HOST_CALLS, HOST_ROUNDS = 20, 7  # fewer launches than the queue to the GPU holds


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over `rounds` samples. cpu_us: median CPU time."""

    median_us: float
    p10_us: float
    p90_us: float
    best_us: float
    rounds: int
    cpu_us: float | None = None

    @classmethod
    def of(cls, samples: Sequence["Sample"], calls: int = 1) -> "Timing":
        """From samples of `calls` calls each."""
        ordered = sorted(1e6 * sample.wall / calls for sample in samples)
        low, high = (ordered[round(tenths * (len(ordered) - 1) / 10)] for tenths in (1, 9))
        cpu = 1e6 * statistics.median(sample.cpu for sample in samples) / calls
        return cls(statistics.median(ordered), low, high, ordered[0], len(ordered), cpu)


@dataclass(frozen=True)
class Sample:
    """Seconds of wall and of CPU time."""

    wall: float
    cpu: float

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Effort:
    """How long to measure: until `seconds` are over, but at least and at most so many rounds."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 200

    def rounds(self) -> Iterator[int]:
        """Numbers of the rounds."""
        begun = time.perf_counter()
        for number in range(self.max_rounds):
            if number >= self.min_rounds and time.perf_counter() - begun >= self.seconds:
                return
            yield number


class Stopwatch:
    """Marks in time on a device, launch gaps of a GPU included."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._cpu = time.thread_time if torch.get_num_threads() == 1 else time.process_time

    def mark(self) -> tuple:
        """Now, of wall or GPU time and of CPU time."""
        if not self._cuda:
            return time.perf_counter(), self._cpu()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, self._cpu()

    def between(self, one: tuple, other: tuple) -> Sample:
        """From one mark to another; waits for the second."""
        if not self._cuda:
            return Sample(other[0] - one[0], other[1] - one[1])
        other[0].synchronize()
        return Sample(one[0].elapsed_time(other[0]) / 1e3, other[1] - one[1])

    def sample(self, call: Call) -> Sample:
        """Of a call; freeing its result is not counted."""
        if self._cuda:
            torch.cuda.synchronize()
        begun = self.mark()
        result = call()
        ended = self.mark()
        del result
        return self.between(begun, ended)


def measure(
    contenders: Mapping[str, Sequence[Call]], effort: Effort, device: torch.device
) -> dict[str, Timing]:
    """Time every contender once a round, after one round to warm up.

    Each sample of any contender uses the next buffer, so that none finds operands in a cache where another
    left them. A Replay counts as its calls.
    """
    watch, turn = Stopwatch(device), 0
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}

    def round_(kept: dict[str, list[Sample]]) -> None:
        nonlocal turn
        for name, buffers in contenders.items():
            kept[name].append(watch.sample(buffers[turn % len(buffers)]))
            turn += 1

    gc.disable()  # no garbage collection between two readings of the clock
    try:
        round_({name: [] for name in contenders})
        for _ in effort.rounds():
            round_(samples)
    finally:
        gc.enable()
    calls = {name: getattr(buffers[0], "calls", 1) for name, buffers in contenders.items()}
    return {name: Timing.of(found, calls[name]) for name, found in samples.items()}


@dataclass
class Replay:
    """Calls that are made together. results: kept, so that every call writes memory of its own."""

    run: Call
    calls: int
    results: list[object]

    def __call__(self) -> object:
        return self.run()


def captured(calls: Sequence[Call], device: torch.device, ideal_us: float) -> Replay:
    """A graph that makes every call equally often, in turn, until it has about GRAPH_US of work.

    Equally often: else a replay would begin with buffers that the one before has just read. ideal_us: what a
    call would take at the speed of memory. The calls must have run before.
    """
    wanted = max(2, min(MOST_CALLS, round(GRAPH_US / max(ideal_us, LAUNCH_US))))
    turns = [*calls] * -(-wanted // len(calls))
    if device.type != "cuda":
        return Replay(lambda: [call() for call in turns], len(turns), [])
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in turns]
    return Replay(graph.replay, len(turns), results)


def host_us(calls: Sequence[Call], device: torch.device) -> float:
    """Microseconds that the host spends on a call: median over a few rounds, each on an idle GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = []
    for _ in range(HOST_ROUNDS):
        wait()
        begun = time.perf_counter()
        for turn in range(HOST_CALLS):
            calls[turn % len(calls)]()
        rounds.append(1e6 * (time.perf_counter() - begun) / HOST_CALLS)
    wait()
    return statistics.median(rounds)


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels and memory operations that a call puts on the GPU; None on a CPU, where it runs too."""
    if device.type != "cuda":
        call()
        return None
    from torch.profiler import DeviceType, ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())
