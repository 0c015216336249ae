"""`fastcache sample`."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from fastcache.cli.errors import naming, refusal
from fastcache.cli.model_options import (
    LAST_STEP,
    MOST_PICTURES,
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
from fastcache.cli.policy_options import PolicyFields, PolicyName, plan_of, policy_from
from fastcache.files.whole import require_writable_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastcache.models import DiT


def sample(
    out: Annotated[
        Path, Option(help="Folder for the pictures; those that are there already are not made again.")
    ] = Path("out/sample"),
    checkpoint: CheckpointPath = None,
    num_heads: NumHeads = None,
    vae: Annotated[
        str | None, Option(help="diffusers' AutoencoderKL, by name or folder, for a model of latents.")
    ] = None,
    classes: Annotated[str, Option(help="Class numbers such as 0,5,10-19.")] = "0-7",
    per_class: Annotated[int, Option(min=1, max=MOST_PICTURES, help="Pictures of each class.")] = 1,
    steps: Annotated[int, Option(min=1, max=LAST_STEP, help="Steps of the scheduler.")] = 50,
    guidance: Guidance = 2.5,
    seed: Seed = 0,
    scheduler: SchedulerName = "ddim",
    policy: PolicyName = None,
    fields: PolicyFields = None,
    batch_size: Annotated[int, Option(min=1, help="Pictures made at once.")] = 12,
    device: DeviceName = None,
    dtype: DtypeName = "float32",
) -> None:
    """Sample pictures from a DiT, cached by a policy or not, into a folder. Resumes."""
    check_sampler(scheduler, guidance)
    chosen, place, precision = policy_from(policy, fields), device_from(device), dtype_from(dtype)
    with naming("--out"):
        require_writable_folder(out)

    from rich.console import Console

    from fastcache.cli.pictures import PictureFolder, digest_of_weights
    from fastcache.hosts import recognise
    from fastcache.workshop.glyphs import weights_path
    from fastcache.workshop.glyphs.dataset import to_pixels
    from fastcache.workshop.sampling import sample as sample_pictures
    from fastcache.workshop.schedulers import make_scheduler

    model, diffusion = model_from(checkpoint, num_heads, place, precision)
    numbers = numbers_in(classes, model.config.num_classes - 1)
    if len(numbers) * per_class > MOST_PICTURES:
        raise BadParameter(
            f"--per-class: expected at most {MOST_PICTURES:,} pictures of a run, got"
            f" {len(numbers) * per_class:,}"
        )
    labels = [label for label in numbers for _ in range(per_class)]
    calls = len(make_scheduler(scheduler, steps, diffusion).timesteps)
    plan = None if chosen is None else plan_of(chosen, calls, recognise(model).layout())
    weights = weights_path("glyph-dit.safetensors") if checkpoint is None else checkpoint
    pictures = PictureFolder(
        out,
        [f"{index:05d}-class-{label}.png" for index, label in enumerate(labels)],
        {
            "checkpoint": None if checkpoint is None else checkpoint.name,
            "weights": digest_of_weights(weights),
            "num_heads": model.config.num_heads,
            "classes": classes,
            "per_class": per_class,
            "vae": vae,
            "vae_weights": None if vae is None or not Path(vae).exists() else digest_of_weights(Path(vae)),
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "scheduler": scheduler,
            "dtype": dtype,
            "policy": None if chosen is None else [policy, chosen.fields()],
            "plan": None if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest(),
        },
    )
    pictures.check()
    console = Console(soft_wrap=True, highlight=False)
    side = None if vae is not None else (model.config.input_size,) * 2
    missing, damaged = pictures.missing(side)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        console.print(f"cannot be opened and made again: {out / damaged[0]}{more}")
    if not missing:
        console.print(f"finished before: all {len(labels)} pictures are in {out}")
        return
    decode = _decoder(model, vae, place)

    def write(indices: Sequence[int], made: "Tensor") -> None:
        for index, pixels in zip(indices, to_pixels(decode(made)), strict=True):
            pictures.write(index, pixels)

    samples = sample_pictures(
        model,
        [labels[index] for index in missing],
        indices=missing,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=scheduler,
        diffusion=diffusion,
        policy=chosen,
        batch_size=batch_size,
        on_batch=write,
        title="uncached" if plan is None else plan.policy,
    )
    kinds = Counter({"full": calls}) if plan is None else Counter(plan.kinds())
    console.print(str(samples.summary or f"uncached: {sum(samples.batch_seconds):.2f} s"))
    console.print("steps of a picture: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    console.print(f"{len(missing)} pictures made, {len(labels) - len(missing)} were there: {out}")


def _decoder(model: "DiT", vae: str | None, device: "torch.device") -> Callable[["Tensor"], "Tensor"]:
    """From what the model makes to pictures in [-1, 1]."""
    if vae is None:
        if model.config.in_channels not in (1, 3):
            raise BadParameter(
                f"--vae: this model makes latents of {model.config.in_channels} channels; name a diffusers"
                " AutoencoderKL, such as stabilityai/sd-vae-ft-ema, or its folder"
            )
        return lambda pictures: pictures
    from diffusers import AutoencoderKL

    try:
        decoder = AutoencoderKL.from_pretrained(vae).to(device).requires_grad_(False)
    except Exception as error:  # of the file, the hub and the network, of many kinds
        raise refusal("--vae", ValueError(f"{vae}: {str(error).strip().splitlines()[0]}")) from error
    if decoder.config.latent_channels != model.config.in_channels:
        raise BadParameter(
            f"--vae: {vae} decodes {decoder.config.latent_channels} channels, the model makes"
            f" {model.config.in_channels}"
        )
    return lambda latents: decoder.decode(latents.to(device) / decoder.config.scaling_factor).sample.cpu()
