"""What `sample` and `calibrate` have in common: a model and how it is asked for pictures."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from fastcache.cli.errors import refusal
from fastcache.workshop.schedulers import SCHEDULERS, Diffusion

if TYPE_CHECKING:
    import torch

    from fastcache.models import DiT

DTYPES = ("float32", "bfloat16", "float16")
LAST_STEP = 1000  # timesteps that a model was trained on
MOST_PICTURES = 1_000_000  # of one run

CheckpointPath = Annotated[
    Path | None, Option(help="A DiT as .pt or .safetensors; without it, the shipped glyph model.")
]
NumHeads = Annotated[
    int | None, Option(min=1, help="Attention heads, for a checkpoint of no published size.")
]
Guidance = Annotated[float, Option(help="Scale of classifier-free guidance; 1 turns it off.")]
Seed = Annotated[int, Option(min=0, help="The pictures are a function of it.")]
SchedulerName = Annotated[str, Option(help=f"One of: {', '.join(SCHEDULERS)}.")]
DeviceName = Annotated[str | None, Option(help="cpu or cuda; without it, cuda where there is one.")]
DtypeName = Annotated[str, Option(help=f"One of: {', '.join(DTYPES)}.")]


def check_sampler(scheduler: str, guidance: float) -> None:
    """Raises BadParameter for an unknown scheduler, and guidance that is no finite number."""
    if scheduler not in SCHEDULERS:
        raise BadParameter(f"--scheduler: expected one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if not math.isfinite(guidance):
        raise BadParameter(f"--guidance: expected a finite number, got {guidance}")


def device_from(name: str | None) -> "torch.device":
    """The device of that name, or the one that is there. Raises BadParameter."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name, re.ASCII) is None:
        raise BadParameter(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        built = "" if torch.version.cuda else f", and torch {torch.__version__} is a build without CUDA"
        raise BadParameter(f"--device: got {name!r}, but {count} GPUs were found{built}; use --device cpu")
    return device


def dtype_from(name: str) -> "torch.dtype":
    """torch's dtype of that name. Raises BadParameter."""
    if name not in DTYPES:
        raise BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    import torch

    return getattr(torch, name)


def model_from(
    checkpoint: Path | None, num_heads: int | None, device: "torch.device", dtype: "torch.dtype"
) -> tuple["DiT", Diffusion]:
    """The model of a checkpoint, or the shipped one, and what it was trained to undo.

    Raises BadParameter naming the option and what is wrong with it.
    """
    from fastcache.models import DiT
    from fastcache.models.checkpoint import read_checkpoint, require_finite
    from fastcache.workshop.glyphs import DIFFUSION, load_glyph_dit

    if checkpoint is None:
        model, diffusion = load_glyph_dit(), DIFFUSION
    else:
        try:
            found = read_checkpoint(checkpoint, num_heads=num_heads)
            require_finite(found, checkpoint)
            model, diffusion = DiT.from_stored(found), Diffusion.from_metadata(found.metadata)
        except (ValueError, OSError) as error:
            if str(error).startswith("num_heads: "):
                raise refusal("--num-heads", error, "num_heads") from error
            raise refusal("--checkpoint", _with_path(error, checkpoint)) from error
    return model.to(device, dtype), diffusion


def _with_path(error: Exception, path: Path) -> Exception:
    return error if str(path) in str(error) else ValueError(f"{path}: {error}")


def numbers_in(text: str, largest: int) -> list[int]:
    """ "0,5,10-12" -> [0, 5, 10, 11, 12]. Raises BadParameter for anything but numbers in 0..largest."""
    spans: list[range] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip(), re.ASCII)
        if found is None:
            raise BadParameter(f"--classes: expected numbers and ranges such as 0,5,10-19, got {part!r}")
        first, last = (_number(digits, largest) for digits in (found[1], found[2] or found[1]))
        if first > last:
            raise BadParameter(f"--classes: expected ranges that rise, such as 10-19, got {part.strip()!r}")
        spans.append(range(first, last + 1))
    if sum(map(len, spans)) > MOST_PICTURES:
        raise BadParameter(
            f"--classes: expected at most {MOST_PICTURES:,} numbers, got {sum(map(len, spans)):,}"
        )
    return [number for span in spans for number in span]


def _number(digits: str, largest: int) -> int:
    digits = digits.lstrip("0") or "0"
    if len(digits) > len(str(largest)) or int(digits) > largest:
        shown = digits if len(digits) <= 20 else f"a number of {len(digits)} digits"
        raise BadParameter(f"--classes: expected numbers in 0..{largest}, got {shown}")
    return int(digits)
