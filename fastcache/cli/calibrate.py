"""`fastcache calibrate`."""

from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from typer import BadParameter, Option

from fastcache.calibration.errors import calibrate as calibrate_model
from fastcache.cli.sample import DTYPES, model_from, numbers_in
from fastcache.workshop.sampling import SCHEDULERS, make_scheduler, sample as sample_pictures


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
    per_layer: Annotated[bool, Option(help="A schedule for each branch of each block.")] = False,
    samples: Annotated[int, Option(min=1, help="Generations whose errors are averaged.")] = 4,
    checkpoint: Annotated[
        Path | None, Option(help="A DiT as .pt or .safetensors; without it, the shipped glyph model.")
    ] = None,
    num_heads: Annotated[
        int | None, Option(help="Attention heads, for a checkpoint of no published size.")
    ] = None,
    classes: Annotated[
        str, Option(help="Class numbers of the pictures of one generation, such as 0,5,10-19.")
    ] = "0-7",
    steps: Annotated[int, Option(min=2, help="Steps of the scheduler.")] = 50,
    guidance: Annotated[float, Option(help="Scale of classifier-free guidance; 1 turns it off.")] = 2.5,
    seed: Annotated[int, Option(min=0, help="The pictures are a function of it.")] = 0,
    scheduler: Annotated[str, Option(help=f"One of: {', '.join(SCHEDULERS)}.")] = "ddim",
    draw: Annotated[Path | None, Option(help="Also draw errors and schedule to this PNG.")] = None,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, Option(help=f"One of: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    """Measure how features change from step to step, and write the SmoothCache schedule that follows."""
    if (threshold is None) == (target_speedup is None):
        raise BadParameter("--threshold, --target-speedup: give exactly one of them")
    if scheduler not in SCHEDULERS:
        raise BadParameter(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if dtype not in DTYPES:
        raise BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    model, diffusion = model_from(checkpoint, num_heads)
    model.to(device, DTYPES[dtype])
    labels = numbers_in(classes, model.config.num_classes - 1)

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
        )

    found = calibrate_model(
        model,
        run,
        threshold=threshold,
        target_speedup=target_speedup,
        lookahead=lookahead,
        samples=samples,
        per_layer=per_layer,
        num_steps=len(make_scheduler(scheduler, steps, diffusion).timesteps),
        scheduler=scheduler,
        calls_per_step=1,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    console = Console()
    console.print(
        f"threshold {found.threshold:.4g}: {found.published.describe()}; ideal speedup"
        f" {found.schedule().ideal_speedup():.2f}x",
        highlight=False,
    )
    console.print(
        f"schedule: {out}   use it: fastcache sample --policy smoothcache --set schedule={out}",
        highlight=False,
    )
    if draw is not None:
        draw.parent.mkdir(parents=True, exist_ok=True)
        found.draw(draw)
        console.print(f"drawn: {draw}", highlight=False)
