"""Stage `end_to_end`: DiT-XL/2 of random weights, 50 steps with CFG, in every way of `ways.py`: at 256 px, and at 512 px with one batch."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.bandwidth import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.cases import Case, Form, Size
from benchmarks.correctness import relative_rms
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.gate.ways import COMPILED, INTERVAL, WAYS, Trajectory, Way, schedule, trajectory
from benchmarks.graphed import launches
from benchmarks.timing import Effort, Timing
from fastcache import FORA, accelerate
from fastcache.models import DiT
from fastcache.models.dit import PRESETS, DiTConfig

XL = PRESETS["DiT-XL/2"]
MODEL = DiTConfig(
    input_size=32,
    patch_size=XL.patch_size,
    in_channels=4,
    hidden_size=XL.hidden_size,
    depth=XL.depth,
    num_heads=XL.num_heads,
)
TINY_MODEL = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=4
)
BATCHES, STEPS = (1, 8, 32), 50  # images; the model's batch is twice that
ALLOWED_ERROR = 5e-2  # relative RMS of bf16 outputs of two ways that compute the same
COMPARED = INTERVAL + 1  # last steps, cheap ones among them
LARGE_MODEL, LARGE_BATCH = (
    replace(MODEL, input_size=64),
    4,
)  # 512 px; without the compiled blocks, whose compilation it could not pay
PIXELS = 8  # of a latent pixel's side
GENERATIONS = 3
WARM_STEPS = 2 * INTERVAL
REPLAYS = 50
SLACK, EXTRA_US = 1.15, 60.0  # the target for a graphed reuse step: SLACK x the trunk's floor + EXTRA_US


@dataclass(frozen=True)
class WayRow:
    """One way at one batch. steps: time of a step by its kind; begin, generation: all 50 steps and what comes before them.

    launches: kernels and memory operations of a step by kind. error: relative RMS of the last outputs
    against the way that it must reproduce. peak_bytes: of GPU memory, the model included. ideal: speedup by
    FLOPs, None without a plan.
    """

    pixels: int
    batch: int
    way: str
    generation: Timing
    steps: dict[str, Timing]
    launches: dict[str, int | None]
    peak_bytes: int | None
    error: float | None
    ideal: float | None


@dataclass(frozen=True)
class GraphRow:
    """The reuse step, captured in a graph with embedders and final layer. floor_us: the trunk's least bytes at the copy bandwidth of this run."""

    batch: int
    replay: Timing
    floor_us: float
    target_us: float
    launches: int | None


def end_to_end(stage: Stage) -> None:
    """Batch by batch, way by way, until the budget is spent."""
    device = torch.device("cpu" if stage.dry_run else "cuda")
    config, batches, steps, dtype = (
        (TINY_MODEL, (1,), 4, torch.float32) if stage.dry_run else (MODEL, BATCHES, STEPS, torch.bfloat16)
    )
    if stage.dry_run:
        check_real_model(stage)
    with torch.no_grad():
        bandwidth = measure_bandwidth(
            device, Effort(0.0, 1, 1) if stage.dry_run else BRIEF, 1 if stage.dry_run else 8
        )
        stage.put(
            device=str(device) if stage.dry_run else torch.cuda.get_device_name(device),
            model="DiT-XL/2, bf16, random weights",
            num_steps=steps,
            policy=", ".join(dict.fromkeys(str(way.policy) for way in WAYS if way.policy is not None)),
            ways=[],
            graphs=[],
            absent=[],
            clocks=[],
        )
        if not stage.dry_run:
            stage.put(bandwidth=asdict(bandwidth))
        for sized, batch in runs(config, batches, dry_run=stage.dry_run):
            run_ = trajectory(sized, batch, steps, device, dtype)
            outputs: dict[str, Tensor] = {}
            large = sized.input_size != config.input_size
            for way in WAYS:
                if large and way.name == COMPILED:
                    continue
                if stage.seconds_left < 5:
                    stage.add(
                        "absent",
                        {
                            "pixels": pixels(sized),
                            "batch": batch,
                            "way": way.name,
                            "reason": "the budget of the stage was used up",
                        },
                    )
                    continue
                one(stage, run_, batch, way, outputs)
            if stage.seconds_left > 5 and not large:
                graph(stage, run_, batch, bandwidth)
            stage.add("clocks", {"after": batch, "seen": clocks()})
    wrong = [one["way"] for one in stage.results.stage("end_to_end")["absent"] if "differs" in one["reason"]]
    if wrong:
        raise Failed(f"outputs differ from those of the way that they must reproduce: {', '.join(wrong)}")


def runs(config: DiTConfig, batches: tuple[int, ...], *, dry_run: bool) -> list[tuple[DiTConfig, int]]:
    """(model, images) in the order in which they are measured."""
    large = (replace(config, input_size=2 * config.input_size), 1) if dry_run else (LARGE_MODEL, LARGE_BATCH)
    return [*((config, batch) for batch in batches), large]


def pixels(config: DiTConfig) -> int:
    """Side of a picture."""
    return PIXELS * config.input_size


def check_real_model(stage: Stage) -> None:
    """The real models at every batch, with tensors that have shapes and no memory."""
    parameters = None
    for config, batch in runs(MODEL, BATCHES, dry_run=False):
        with torch.device("meta"), torch.no_grad():
            model = DiT.from_config(config).to(torch.bfloat16)
            rows, side = 2 * batch, config.input_size
            output = model.forward_with_cfg(
                torch.empty(rows, config.in_channels, side, side, dtype=torch.bfloat16),
                torch.empty(rows),
                torch.empty(rows, dtype=torch.long),
                4.0,
            )
            if output.shape != (rows, config.out_channels, side, side):
                raise Failed(f"DiT-XL/2 at {pixels(config)} px and batch {batch} gives {list(output.shape)}")
            parameters = sum(parameter.numel() for parameter in model.parameters())
    stage.put(parameters=parameters, batches=list(BATCHES))
    stage.say(
        f"DiT-XL/2 with {parameters / 1e6:.0f} M parameters takes batches {', '.join(map(str, BATCHES))}"
    )


def one(stage: Stage, run_: Trajectory, batch: int, way: Way, outputs: dict[str, Tensor]) -> None:
    """Measure a way; what goes wrong is in `absent`, and the others go on."""
    try:
        row = measure_way(run_, batch, way, outputs, stage)
    except Exception as error:  # one way must not cost the others
        stage.add(
            "absent",
            {
                "pixels": pixels(run_.model.config),
                "batch": batch,
                "way": way.name,
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            },
        )
        stage.say(
            f"{pixels(run_.model.config)} px, batch {batch}, {way.name}: {type(error).__name__}: {error}"
        )
        if stage.dry_run:
            raise
        return
    if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
        stage.add(
            "ways",
            {
                "pixels": row.pixels,
                "batch": batch,
                "way": way.name,
                "kinds": sorted(row.steps),
                "error": row.error,
                "ideal": row.ideal,
            },
        )
        stage.say(f"{row.pixels} px, batch {batch}, {way.name}: ran {', '.join(sorted(row.steps))} steps")
        return
    stage.add("ways", asdict(row))
    stage.say(
        f"{row.pixels} px, batch {batch}, {way.name}: {row.generation.median_us / 1e3:.0f} ms, "
        + ", ".join(f"{kind} {timing.median_us / 1e3:.2f} ms" for kind, timing in row.steps.items())
    )


def measure_way(run_: Trajectory, batch: int, way: Way, outputs: dict[str, Tensor], stage: Stage) -> WayRow:
    """A few steps to warm up, then whole generations with a mark in time around every step."""
    device, kinds = run_.x.device, [way.kind(step, run_.steps) for step in range(run_.steps)]
    generations, begins, samples = [], [], {kind: [] for kind in kinds}
    with way.enter(run_) as control:
        control.begin()
        for step in range(min(WARM_STEPS, run_.steps - 1)):
            control.before(step)
            run_.call(step)
        control.stop()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for number in range(GENERATIONS):
            if number and (stage.dry_run or stage.seconds_left < 10):
                break
            marks = [mark(device)]
            control.begin()
            marks.append(mark(device))
            last: deque[Tensor] = deque(maxlen=COMPARED)
            for step in range(run_.steps):
                control.before(step)
                last.append(run_.call(step))
                marks.append(mark(device))
            seconds = [between(one, other, device) for one, other in zip(marks, marks[1:])]
            begins.append(seconds[0])
            generations.append(sum(seconds))
            for kind, sample in zip(kinds, seconds[1:]):
                samples[kind].append(sample)
        counts = counted(run_, control, kinds, device, round(way.settled * run_.steps))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    outputs[way.name] = torch.stack(tuple(last)).float()
    error = relative_rms(outputs[way.name], outputs[way.exact].double()) if way.exact else None
    if error is not None and not error <= ALLOWED_ERROR:
        raise ValueError(
            f"differs from {way.exact!r} by {error:.2e} (relative RMS), allowed {ALLOWED_ERROR:.0e}"
        )
    ideal = None if way.policy is None else schedule(way.policy, run_).ideal_speedup()
    return WayRow(
        pixels(run_.model.config),
        batch,
        way.name,
        Timing.of(generations),
        {kind: Timing.of(found) for kind, found in samples.items()},
        counts,
        peak,
        error,
        ideal,
    )


def counted(
    run_: Trajectory, control, kinds: list[str], device: torch.device, settled: int = 0
) -> dict[str, int | None]:
    """Launches of the second step of each kind (the first of some keep features for later), counted from step `settled` on."""
    found: dict[str, int | None] = {}
    control.begin()
    seen: dict[str, int] = {}
    for step, kind in enumerate(kinds):
        control.before(step)
        seen[kind] = seen.get(kind, 0) + (step >= settled)
        if step >= settled and kind not in found and seen[kind] == min(2, kinds[settled:].count(kind)):
            found[kind] = launches(lambda step=step: run_.call(step), device)
            if device.type != "cuda":
                run_.call(step)
        else:
            run_.call(step)
        if len(found) == len(set(kinds[settled:])):
            break
    control.stop()
    return found


def graph(stage: Stage, run_: Trajectory, batch: int, bandwidth: Bandwidth) -> None:
    """The graphed reuse step against the trunk's floor."""
    device, config = run_.x.device, run_.model.config
    trunk = Case(
        Form.TRUNK,
        Size("trunk", run_.rows, config.grid**2, config.hidden_size, 2 * config.depth),
        run_.x.dtype,
    )
    floor = 1e-3 * trunk.min_bytes / bandwidth.copy_gbps
    with accelerate(
        run_.model, FORA(interval=INTERVAL), run_.steps, calls_per_step=1, count_ops=False
    ) as session:
        session.begin(timesteps=run_.timesteps, conditions={"y": run_.y})
        run_.call(0)

        def reuse() -> Tensor:
            session.step(1)
            return run_.call(1)

        for _ in range(3):
            reuse()
        replay = reuse
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                reuse()
            replay = captured.replay
        times = replayed(replay, device)
        count = launches(replay, device)
        session.reset()
    if stage.dry_run:
        stage.add("graphs", {"batch": batch, "trunk_bytes": trunk.min_bytes})
        return
    row = GraphRow(batch, times, floor, SLACK * floor + EXTRA_US, count)
    stage.add("graphs", asdict(row))
    stage.say(
        f"batch {batch}, reuse step in a graph: {times.median_us:.1f} us, floor of its trunk {floor:.1f} us, target {row.target_us:.1f} us"
    )


def replayed(replay: Callable[[], object], device: torch.device) -> Timing:
    """Single replays, each after the one before has ended."""
    samples = []
    for _ in range(REPLAYS):
        begun = mark(device)
        replay()
        samples.append(between(begun, mark(device), device))
    return Timing.of(samples)


def mark(device: torch.device) -> object:
    """A mark in time on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(one: object, other: object, device: torch.device) -> float:
    """Seconds between two marks; waits for the second."""
    if device.type != "cuda":
        return other - one
    other.synchronize()
    return one.elapsed_time(other) / 1e3


if __name__ == "__main__":
    run("end_to_end", end_to_end)
