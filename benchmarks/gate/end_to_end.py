"""Stage `end_to_end`: DiT-XL/2 of random weights, 50 steps with CFG, in every way of METHODS."""

from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.cases import Case, Form, Size
from benchmarks.contest import NotMeasured, WrongValues, absence
from benchmarks.gate.prerequisites import clocks
from benchmarks.gate.stage import Failed, Stage, run
from benchmarks.generations import (
    FORA_3,
    HOST,
    METHODS as ALL_METHODS,
    TINY_DIT,
    Contest,
    Control,
    Entrant,
    Found,
    ModelSize,
    Way,
    method_row,
)
from benchmarks.machine import BRIEF, Bandwidth, measure_bandwidth
from benchmarks.sequences import relative_rms
from benchmarks.timing import Effort, Stopwatch, Timing, launches
from fastcache.models.dit import DiTConfig

MODEL = ModelSize("DiT-XL/2", DiTConfig(32, 2, 4, 1152, 28, 16), 50, std=0.02)
LARGE = replace(MODEL, config=replace(MODEL.config, input_size=64), images=4)  # 512 px
SIZES = (*(replace(MODEL, images=images) for images in (1, 8, 32)), LARGE)
TINY = ModelSize("tiny", TINY_DIT, 4, std=0.02)
TINY_SIZES = (TINY, replace(TINY, config=replace(TINY_DIT, input_size=16)))
METHODS = (FORA_3, *ALL_METHODS[:3])
COMPILED = Entrant(None, Way.COMPILED)
ENTRANTS = (
    HOST,
    COMPILED,
    *(Entrant(FORA_3, way) for way in (Way.ORIGINAL, Way.OURS, Way.BEGUN)),
    *(Entrant(method, way) for method in METHODS[1:] for way in (Way.ORIGINAL, Way.BEGUN)),
)
ALLOWED_ERROR = 5e-2  # relative RMS of bf16 outputs of two ways that compute the same
COMPARED = 4  # last steps, cheap ones among them
PIXELS = 8  # of a latent pixel's side
LEAST_SECONDS = 5  # that must be left to begin a way
GENERATIONS, WARM_STEPS, REPLAYS = 3, 6, 50
SLACK, EXTRA_US = 1.15, 60.0  # the target for a graphed reuse step: SLACK x the trunk's floor + EXTRA_US


def end_to_end(stage: Stage) -> None:
    """Size by size, way by way, until the budget is spent."""
    device, dry = torch.device("cpu" if stage.dry_run else "cuda"), stage.dry_run
    sizes, dtype = (TINY_SIZES, torch.float32) if dry else (SIZES, torch.bfloat16)
    name = str(device) if dry else torch.cuda.get_device_name(device)
    stage.put(device=name, methods=[], graphs=[], absent=[], clocks=[])
    with torch.no_grad():
        bandwidth = measure_bandwidth(device, *((Effort(0.0, 1, 1), 1) if dry else (BRIEF, 8)))
        for size in sizes:
            large = size.config.input_size > sizes[0].config.input_size
            contest, found, outputs = Contest(size, METHODS, device, dtype), {}, {}
            # the larger pictures could not pay for a compilation
            for entrant in (one for one in ENTRANTS if not large or one != COMPILED):
                generate(stage, contest, entrant, found, outputs)
            if stage.seconds_left > LEAST_SECONDS and not large:
                graph(stage, contest, bandwidth)
            stage.add("clocks", {"after": named(size), "seen": clocks()})
    wrong = [one for one in stage.found["absent"] if one["reason"].startswith(WrongValues.__name__)]
    if wrong:
        names = ", ".join(one["provider"] for one in wrong)
        raise Failed(f"outputs differ from those of the way that they must reproduce: {names}")


def named(size: ModelSize) -> str:
    """`256 px, 8 images`."""
    return f"{PIXELS * size.config.input_size} px, {size.images} images"


def generate(
    stage: Stage, contest: Contest, entrant: Entrant, found: dict[Entrant, Found], outputs: dict
) -> None:
    """Measure a way and write its row; what goes wrong is in `absent`, and the others go on."""
    size = named(contest.size)
    try:
        if stage.seconds_left < LEAST_SECONDS:
            raise NotMeasured("the budget of the stage was used up")
        made = measured(stage, contest, entrant)
        made.error = error_of(entrant, torch.stack([*made.generations[-1].outputs]).float(), outputs)
    except Exception as error:  # one way must not cost the others
        if stage.dry_run:
            raise
        stage.add("absent", absence(size, entrant.name, error))
        stage.say(f"{size}, {entrant.name}: {stage.found['absent'][-1]['reason']}")
        return
    found[entrant] = made
    row = method_row(contest, entrant, found) | {"model": size, "part": "methods"}
    if stage.dry_run:  # times of a rehearsal on a CPU mean nothing, and are not kept
        stage.add("methods", {name: row[name] for name in ("model", "method", "way", "error", "ideal")})
        return
    stage.add("methods", row | {"peak_bytes": torch.cuda.max_memory_allocated(contest.device)})
    times = ", ".join(f"{kind['kind']} {kind['timing']['median_us'] / 1e3:.2f} ms" for kind in row["kinds"])
    stage.say(f"{size}, {entrant.name}: {row['generation']['median_us'] / 1e3:.0f} ms, {times}")


def measured(stage: Stage, contest: Contest, entrant: Entrant) -> Found:
    """A few steps to warm up, then whole generations with a mark in time around every step."""
    steps, method, found = contest.size.steps, entrant.method, Found({})
    with contest.entered(entrant) as control:
        control.begin()
        for step in range(min(WARM_STEPS, steps - 1)):
            control.call(step)
        control.stop()
        if contest.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(contest.device)
        rounds = 1 if stage.dry_run else GENERATIONS
        while len(found.generations) < rounds and not (found.generations and stage.seconds_left < 10):
            found.generations.append(control.generate(kept=COMPARED))
        found.costs = counted(control, contest.kinds(method))
    return found


def error_of(entrant: Entrant, found: Tensor, outputs: dict[Entrant, Tensor]) -> float | None:
    """Against the host for compiled blocks, and the original for our ways. Raises WrongValues."""
    outputs[entrant] = found
    if entrant.way in (Way.HOST, Way.ORIGINAL):
        return None
    exact = Entrant(entrant.method, Way.ORIGINAL if entrant.method else Way.HOST)
    error = relative_rms(found, outputs[exact])
    if not error <= ALLOWED_ERROR:
        off = f"differs from {exact.name!r} by {error:.2e} (relative RMS)"
        raise WrongValues(f"{off}, allowed {ALLOWED_ERROR:.0e}")
    return error


def counted(control: Control, kinds: list[str]) -> dict[str, dict]:
    """Launches of the last step of each kind (the first of some keep features for later, or refresh none)."""
    last = {kind: step for step, kind in enumerate(kinds)}
    found: dict[str, dict] = {}
    control.begin()
    for step, kind in enumerate(kinds):
        if step == last[kind]:
            call = lambda step=step: control.call(step)
            found[kind] = {"launches": launches(call, control.contest.device)}
        else:
            control.call(step)
    return found


def graph(stage: Stage, contest: Contest, bandwidth: Bandwidth) -> None:
    """The reuse step in a graph, embedders included, against the least bytes of its trunk."""
    device, config, images = contest.device, contest.size.config, contest.size.images
    tokens = (config.input_size // config.patch_size) ** 2
    trunk = Size("trunk", 2 * images, tokens, config.hidden_size, 2 * config.depth)
    floor = 1e-3 * Case(Form.TRUNK, trunk, contest.dtype).min_bytes / bandwidth.copy_gbps
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
        row = {"images": images, "launches": launches(replay, device)}
        control.stop()
    if not stage.dry_run:
        row |= {"replay": asdict(times), "floor_us": floor, "target_us": SLACK * floor + EXTRA_US}
    stage.add("graphs", row)


if __name__ == "__main__":
    run("end_to_end", end_to_end)
