"""Stage `end_to_end`: DiT-XL/2 of random weights, 50 steps with CFG, in every way: at 256 px, and at 512 px
with one batch. Another method joins by its `Method` in METHODS."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import Case, Form, Size
from benchmarks.contest import first_line
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.generations import (
    FORA_3,
    METHODS as ALL_METHODS,
    TINY_DIT,
    Contest,
    Control,
    Entrant,
    Generation,
    ModelSize,
    Way,
)
from benchmarks.machine import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.sequences import relative_rms
from benchmarks.timing import Effort, Stopwatch, Timing, launches
from fastcache.models import DiT
from fastcache.models.dit import DiTConfig

STEPS = 50
MODEL = ModelSize("DiT-XL/2", DiTConfig(32, 2, 4, 1152, 28, 16), STEPS, std=0.02)
LARGE = replace(MODEL, config=replace(MODEL.config, input_size=64), images=4)  # 512 px
SIZES = (*(replace(MODEL, images=images) for images in (1, 8, 32)), LARGE)
TINY = ModelSize("tiny", TINY_DIT, 4, std=0.02)
TINY_SIZES = (TINY, replace(TINY, config=replace(TINY_DIT, input_size=16)))
METHODS = (FORA_3, *ALL_METHODS[:3])
HOST, COMPILED = Entrant(None, Way.HOST), Entrant(None, Way.COMPILED)
ENTRANTS = (
    HOST,
    COMPILED,
    *(Entrant(FORA_3, way) for way in (Way.ORIGINAL, Way.OURS, Way.BEGUN)),
    *(Entrant(method, way) for method in METHODS[1:] for way in (Way.ORIGINAL, Way.BEGUN)),
)
ALLOWED_ERROR = 5e-2  # relative RMS of bf16 outputs of two ways that compute the same
COMPARED = 4  # last steps, cheap ones among them
PIXELS = 8  # of a latent pixel's side
GENERATIONS, WARM_STEPS, REPLAYS = 3, 6, 50
SETTLED = {"ToCa": 0.3, "DuCa": 0.3}  # share of a generation after which tokens are refreshed
SLACK, EXTRA_US = 1.15, 60.0  # the target for a graphed reuse step: SLACK x the trunk's floor + EXTRA_US


@dataclass(frozen=True)
class WayRow:
    """One way at one batch. steps: time of a step by its kind; begin, generation: all steps and what is
    before them.

    launches: kernels and memory operations of a step by kind. error: relative RMS of the last outputs against
    the way that it must reproduce. peak_bytes: of GPU memory, the model included. ideal: speedup by FLOPs,
    None without a plan.
    """

    pixels: int
    batch: int
    way: str
    generation: Timing
    begin: Timing
    steps: dict[str, Timing]
    launches: dict[str, int | None]
    peak_bytes: int | None
    error: float | None
    ideal: float | None


@dataclass(frozen=True)
class GraphRow:
    """The reuse step, captured in a graph with embedders and final layer. floor_us: the trunk's least bytes
    at the copy bandwidth of this run."""

    batch: int
    replay: Timing
    floor_us: float
    target_us: float
    launches: int | None


def end_to_end(stage: Stage) -> None:
    """Batch by batch, way by way, until the budget is spent."""
    device, dry = torch.device("cpu" if stage.dry_run else "cuda"), stage.dry_run
    sizes, dtype = (TINY_SIZES, torch.float32) if dry else (SIZES, torch.bfloat16)
    if dry:
        check_real_model(stage)
    policies = ", ".join(str(method.policy(sizes[0].steps)) for method in METHODS)
    with torch.no_grad():
        bandwidth = measure_bandwidth(device, *((Effort(0.0, 1, 1), 1) if dry else (BRIEF, 8)))
        name = str(device) if dry else torch.cuda.get_device_name(device)
        what = {"model": "DiT-XL/2, bf16, random weights", "num_steps": sizes[0].steps, "policy": policies}
        stage.put(device=name, **what, ways=[], graphs=[], absent=[], clocks=[])
        if not dry:
            stage.put(bandwidth=asdict(bandwidth))
        for size in sizes:
            contest, outputs = Contest(size, METHODS, device, dtype), {}
            large = size.config.input_size > sizes[0].config.input_size
            for entrant in ENTRANTS:
                if large and entrant == COMPILED:  # whose compilation it could not pay
                    continue
                if stage.seconds_left < 5:
                    absent(stage, contest, entrant, "the budget of the stage was used up")
                    continue
                one(stage, contest, entrant, outputs)
            if stage.seconds_left > 5 and not large:
                graph(stage, contest, bandwidth)
            stage.add("clocks", {"after": size.images, "seen": clocks()})
    wrong = [one["way"] for one in stage.found["absent"] if "differs" in one["reason"]]
    if wrong:
        raise Failed(f"outputs differ from those of the way that they must reproduce: {', '.join(wrong)}")


def pixels(size: ModelSize) -> int:
    """Side of a picture."""
    return PIXELS * size.config.input_size


def absent(stage: Stage, contest: Contest, entrant: Entrant, reason: str) -> None:
    """Record why a way was not measured."""
    size = contest.size
    where = {"pixels": pixels(size), "batch": size.images, "way": entrant.name, "reason": reason}
    stage.add("absent", where)
    stage.say(f"{pixels(size)} px, batch {size.images}, {entrant.name}: {reason}")


def check_real_model(stage: Stage) -> None:
    """The real models at every batch, with tensors that have shapes and no memory."""
    parameters = 0
    for size in SIZES:
        config, rows, side = size.config, 2 * size.images, size.config.input_size
        with torch.device("meta"), torch.no_grad():
            model = DiT.from_config(config).to(torch.bfloat16)
            x = torch.empty(rows, config.in_channels, side, side, dtype=torch.bfloat16)
            output = model.forward_with_cfg(x, torch.empty(rows), torch.empty(rows, dtype=torch.long), 4.0)
        if output.shape != (rows, config.out_channels, side, side):
            raise Failed(f"DiT-XL/2 at {pixels(size)} px and batch {size.images} gives {list(output.shape)}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
    batches = [size.images for size in SIZES[:-1]]
    stage.put(parameters=parameters, batches=batches)
    stage.say(
        f"DiT-XL/2 with {parameters / 1e6:.0f} M parameters takes batches {', '.join(map(str, batches))}"
    )


def one(stage: Stage, contest: Contest, entrant: Entrant, outputs: dict[str, Tensor]) -> None:
    """Measure a way; what goes wrong is in `absent`, and the others go on."""
    try:
        row = measure_way(stage, contest, entrant, outputs)
    except Exception as error:  # one way must not cost the others
        absent(stage, contest, entrant, first_line(error))
        if stage.dry_run:
            raise
        return
    where = f"{row.pixels} px, batch {row.batch}, {row.way}"
    if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
        kept = {name: getattr(row, name) for name in ("pixels", "batch", "way", "error", "ideal")}
        stage.add("ways", kept | {"kinds": sorted(row.steps)})
        stage.say(f"{where}: ran {', '.join(sorted(row.steps))} steps")
        return
    stage.add("ways", asdict(row))
    times = ", ".join(f"{kind} {timing.median_us / 1e3:.2f} ms" for kind, timing in row.steps.items())
    stage.say(f"{where}: {row.generation.median_us / 1e3:.0f} ms, {times}")


def measure_way(stage: Stage, contest: Contest, entrant: Entrant, outputs: dict[str, Tensor]) -> WayRow:
    """A few steps to warm up, then whole generations with a mark in time around every step."""
    size, method, cuda = contest.size, entrant.method, contest.device.type == "cuda"
    kinds, generations = contest.kinds(method), []
    with contest.entered(entrant) as control:
        control.begin()
        for step in range(min(WARM_STEPS, size.steps - 1)):
            control.call(step)
        control.stop()
        if cuda:
            torch.cuda.reset_peak_memory_stats(contest.device)
        while len(generations) < GENERATIONS and not (
            generations and (stage.dry_run or stage.seconds_left < 10)
        ):
            generations.append(control.generate(kept=COMPARED))
        peak = torch.cuda.max_memory_allocated(contest.device) if cuda else None
        settled = round(SETTLED.get(method.name if method else "", 0.0) * size.steps)
        counts = counted(control, kinds, settled)
    return WayRow(
        pixels=pixels(size),
        batch=size.images,
        way=entrant.name,
        generation=Timing.of([found.total for found in generations]),
        begin=Timing.of([found.begin for found in generations]),
        steps=by_kind(generations, kinds),
        launches=counts,
        peak_bytes=peak,
        error=error_of(entrant, generations[-1], outputs),
        ideal=contest.schedules[method.name].ideal_speedup() if method else None,
    )


def by_kind(generations: Sequence[Generation], kinds: Sequence[str]) -> dict[str, Timing]:
    """Time of a step of each kind."""
    samples = [pair for found in generations for pair in zip(kinds, found.steps, strict=True)]
    names = dict.fromkeys(kinds)
    return {name: Timing.of([sample for kind, sample in samples if kind == name]) for name in names}


def error_of(entrant: Entrant, found: Generation, outputs: dict[str, Tensor]) -> float | None:
    """Against the host for compiled blocks, and the original for our ways; raises ValueError beyond what is
    allowed."""
    outputs[entrant.name] = torch.stack([*found.outputs]).float()
    if entrant.way in (Way.HOST, Way.ORIGINAL):
        return None
    exact = Entrant(entrant.method, Way.ORIGINAL if entrant.method else Way.HOST).name
    error = relative_rms(outputs[entrant.name], outputs[exact])
    if not error <= ALLOWED_ERROR:
        raise ValueError(f"differs from {exact!r} by {error:.2e} (relative RMS), allowed {ALLOWED_ERROR:.0e}")
    return error


def counted(control: Control, kinds: Sequence[str], settled: int = 0) -> dict[str, int | None]:
    """Launches of the second step of each kind (the first of some keep features for later), from `settled`
    on."""
    later = kinds[settled:]
    second = {
        kind: [k for k, one in enumerate(later) if one == kind][:2][-1] for kind in dict.fromkeys(later)
    }
    found: dict[str, int | None] = {}
    control.begin()
    for step in range(settled + max(second.values()) + 1):
        kind = kinds[step]
        if step >= settled and second[kind] == step - settled:
            found[kind] = launches(lambda step=step: control.call(step), control.contest.device)
        else:
            control.call(step)
    control.stop()
    return found


def graph(stage: Stage, contest: Contest, bandwidth: Bandwidth) -> None:
    """The graphed reuse step against the trunk's floor."""
    device, config, batch = contest.device, contest.size.config, contest.size.images
    grid = (config.input_size // config.patch_size) ** 2
    trunk = Size("trunk", 2 * batch, grid, config.hidden_size, 2 * config.depth)
    moved = Case(Form.TRUNK, trunk, contest.inputs[0].dtype).min_bytes
    with contest.entered(Entrant(FORA_3, Way.BEGUN)) as control:
        control.begin()
        control.call(0)

        def reuse() -> Tensor:
            control.session.step(1)
            return control.call(1)

        for _ in range(3):
            reuse()
        replay, watch = reuse, Stopwatch(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                reuse()
            replay = captured.replay
        times = Timing.of([watch.sample(replay) for _ in range(REPLAYS)])
        count = launches(replay, device)
        control.stop()
    if stage.dry_run:
        stage.add("graphs", {"batch": batch, "trunk_bytes": moved})
        return
    floor = 1e-3 * moved / bandwidth.copy_gbps
    row = GraphRow(batch, times, floor, SLACK * floor + EXTRA_US, count)
    stage.add("graphs", asdict(row))
    spent = f"{times.median_us:.1f} us, floor of its trunk {floor:.1f} us, target {row.target_us:.1f} us"
    stage.say(f"batch {batch}, reuse step in a graph: {spent}")


if __name__ == "__main__":
    run("end_to_end", end_to_end)
