"""`fastcache sample`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer import BadParameter, Option

from fastcache.cli.policy_options import PolicyFields, PolicyName, policy_from
from fastcache.models import DiT
from fastcache.models.checkpoint import read_checkpoint
from fastcache.workshop.glyphs import DIFFUSION, load_glyph_dit
from fastcache.workshop.glyphs.dataset import to_pixels
from fastcache.workshop.sampling import SCHEDULERS, Diffusion, sample as sample_pictures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sample(
    out: Annotated[
        Path, Option(help="Folder for the pictures; those that are there already are not made again.")
    ] = Path("out/sample"),
    checkpoint: Annotated[
        Path | None, Option(help="A DiT as .pt or .safetensors; without it, the shipped glyph model.")
    ] = None,
    num_heads: Annotated[
        int | None, Option(help="Attention heads, for a checkpoint of no published size.")
    ] = None,
    vae: Annotated[
        str | None, Option(help="diffusers' AutoencoderKL, by name or folder, for a model of latents.")
    ] = None,
    classes: Annotated[str, Option(help="Class numbers such as 0,5,10-19.")] = "0-7",
    per_class: Annotated[int, Option(min=1, help="Pictures of each class.")] = 1,
    steps: Annotated[int, Option(min=1, help="Steps of the scheduler.")] = 50,
    guidance: Annotated[float, Option(help="Scale of classifier-free guidance; 1 turns it off.")] = 2.5,
    seed: Annotated[int, Option(min=0, help="The pictures are a function of it.")] = 0,
    scheduler: Annotated[str, Option(help=f"One of: {', '.join(SCHEDULERS)}.")] = "ddim",
    policy: PolicyName = None,
    fields: PolicyFields = None,
    batch_size: Annotated[int, Option(min=1, help="Pictures made at once.")] = 12,
    device: Annotated[str, Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, Option(help=f"One of: {', '.join(DTYPES)}.")] = "float32",
) -> None:
    """Sample pictures from a DiT, cached by a policy or not, into a folder."""
    if scheduler not in SCHEDULERS:
        raise BadParameter(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if dtype not in DTYPES:
        raise BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    chosen = policy_from(policy, fields)
    model, diffusion = model_from(checkpoint, num_heads)
    model.to(device, DTYPES[dtype])
    decode = _decoder(model, vae, device)
    labels = [label for label in numbers_in(classes, model.config.num_classes - 1) for _ in range(per_class)]
    paths = [out / f"{index:05d}-class-{label}.png" for index, label in enumerate(labels)]
    _claim(
        out,
        {
            "checkpoint": None if checkpoint is None else checkpoint.name,
            "classes": classes,
            "per_class": per_class,
            "vae": vae,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "scheduler": scheduler,
            "dtype": dtype,
            "policy": None if chosen is None else [policy, chosen.fields()],
        },
    )
    missing = [index for index, path in enumerate(paths) if not path.exists()]

    def write(indices: Sequence[int], pictures: Tensor) -> None:
        for index, picture in zip(indices, to_pixels(decode(pictures)), strict=True):
            Image.fromarray(picture.squeeze()).save(paths[index])

    console = Console()
    if missing:
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
        )
        console.print(
            str(samples.summary or f"uncached: {sum(samples.batch_seconds):.2f} s"), highlight=False
        )
    console.print(
        f"{len(missing)} pictures made, {len(labels) - len(missing)} were there: {out}", highlight=False
    )


def numbers_in(text: str, largest: int) -> list[int]:
    """ "0,5,10-12" -> [0, 5, 10, 11, 12]. Raises BadParameter for anything but numbers in 0..largest."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise BadParameter(f"--classes: expected numbers and ranges such as 0,5,10-19, got {part!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or max(numbers) > largest:
        raise BadParameter(f"--classes: expected numbers in 0..{largest}, got {text!r}")
    return numbers


def model_from(checkpoint: Path | None, num_heads: int | None) -> tuple[DiT, Diffusion]:
    """The model of a checkpoint, or the shipped one, and what it was trained to undo."""
    if checkpoint is None:
        return load_glyph_dit(), DIFFUSION
    found = read_checkpoint(checkpoint, num_heads=num_heads)
    return DiT.from_stored(found), Diffusion.from_metadata(found.metadata)


def _decoder(model: DiT, vae: str | None, device: str) -> Callable[[Tensor], Tensor]:
    """From what the model makes to pictures in [-1, 1]."""
    if vae is None:
        if model.config.in_channels not in (1, 3):
            raise BadParameter(
                f"--vae: this model makes latents of {model.config.in_channels} channels; name a diffusers"
                " AutoencoderKL, such as stabilityai/sd-vae-ft-ema, or its folder"
            )
        return lambda pictures: pictures
    from diffusers import AutoencoderKL

    decoder = AutoencoderKL.from_pretrained(vae).to(device).requires_grad_(False)
    return lambda latents: decoder.decode(latents.to(device) / decoder.config.scaling_factor).sample.cpu()


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Pictures of different settings never mix: the folder remembers what it is for."""
    record, text = out / "settings.json", json.dumps(settings, indent=2) + "\n"
    if record.exists() and record.read_text() != text:
        raise BadParameter(
            f"--out: {out} holds pictures of other settings (see {record}); choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(text)
