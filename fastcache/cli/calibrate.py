"""`fastcache calibrate`."""

import math
from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

from fastcache.cli.errors import naming
from fastcache.cli.model_options import (
    LAST_STEP,
    CheckpointPath,
    DeviceName,
    DtypeName,
    Guidance,
    NumHeads,
    SchedulerName,
    Seed,
    check_sampler,
    device_from,
    dtype_from,
    model_from,
    numbers_in,
)
from fastcache.files.whole import require_writable


def calibrate(
    out: Annotated[Path, Option(help="The schedule, as JSON in SmoothCache's form.")] = Path(
        "out/schedule.json"
    ),
    threshold: Annotated[
        float | None, Option(min=0, help="Largest relative error at which a feature is reused.")
    ] = None,
    target_speedup: Annotated[
        float | None, Option(min=1, help="Find the threshold for this ideal speedup instead.")
    ] = None,
    lookahead: Annotated[int, Option(min=1, help="Most steps in a row that reuse.")] = 3,
    per_layer: Annotated[
        bool, Option("--per-layer", help="A schedule for each branch of each block.")
    ] = False,
    samples: Annotated[int, Option(min=1, help="Generations whose errors are averaged.")] = 4,
    checkpoint: CheckpointPath = None,
    num_heads: NumHeads = None,
    classes: Annotated[
        str, Option(help="Class numbers of the pictures of one generation, such as 0,5,10-19.")
    ] = "0-7",
    steps: Annotated[int, Option(min=2, max=LAST_STEP, help="Steps of the scheduler.")] = 50,
    guidance: Guidance = 2.5,
    seed: Seed = 0,
    scheduler: SchedulerName = "ddim",
    draw: Annotated[Path | None, Option(help="Also draw errors and schedule to this PNG.")] = None,
    device: DeviceName = None,
    dtype: DtypeName = "float32",
) -> None:
    """Measure how features change from step to step, and write the SmoothCache schedule that follows."""
    if (threshold is None) == (target_speedup is None):
        raise BadParameter("--threshold, --target-speedup: give exactly one of them")
    for option, value in (("--threshold", threshold), ("--target-speedup", target_speedup)):
        if value is not None and not math.isfinite(value):
            raise BadParameter(f"{option}: expected a finite number, got {value}")
    check_sampler(scheduler, guidance)
    for option, path in (("--out", out), ("--draw", draw)):
        if path is not None:
            with naming(option):
                require_writable(path)
    place, precision = device_from(device), dtype_from(dtype)

    from rich.console import Console

    from fastcache.calibration.errors import calibrate as calibrate_model
    from fastcache.workshop.progress import Progress
    from fastcache.workshop.sampling import sample as sample_pictures
    from fastcache.workshop.schedulers import make_scheduler

    model, diffusion = model_from(checkpoint, num_heads, place, precision)
    labels = numbers_in(classes, model.config.num_classes - 1)
    calls = len(make_scheduler(scheduler, steps, diffusion).timesteps)

    with Progress(samples, "calibrating", "generation") as bar:

        def run(generation: int) -> None:
            indices = range(generation * len(labels), (generation + 1) * len(labels))
            sample_pictures(
                model,
                labels,
                indices=indices,
                steps=steps,
                guidance=guidance,
                seed=seed,
                scheduler=scheduler,
                diffusion=diffusion,
                batch_size=len(labels),
                progress=False,
            )
            bar.ran({"full": calls})

        found = calibrate_model(
            model,
            run,
            threshold=threshold,
            target_speedup=target_speedup,
            lookahead=lookahead,
            samples=samples,
            per_layer=per_layer,
            num_steps=calls,
            scheduler=scheduler,
            calls_per_step=1,
        )
    found.save(out)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"threshold {found.threshold:.4g}, ideal speedup {found.schedule().ideal_speedup():.2f}x")
    console.print(f"computed steps: {found.published.describe()}")
    console.print(f"schedule: {out}")
    console.print(f"use it:\n  fastcache sample --policy smoothcache --set schedule={out}")
    if draw is not None:
        found.draw(draw)
        console.print(f"drawn: {draw}")
