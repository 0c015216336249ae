"""Glyphs-36: a picture set, a small DiT trained on it, and a classifier to judge with.

The weights live in `weights/` of a checkout, outside the wheel.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastcache.extras import needs_extra
from fastcache.models import DiT
from fastcache.workshop.schedulers import Diffusion

if TYPE_CHECKING:
    from fastcache.workshop.glyphs.classifier import GlyphClassifier

DIFFUSION = Diffusion(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
MAKE_COMMANDS = {
    "glyph-dit.safetensors": "python -m fastcache.workshop.glyphs.train --minutes 66",
    "glyph-classifier.safetensors": "python -m fastcache.workshop.glyphs.classifier",
}


def load_glyph_dit() -> DiT:
    """The shipped DiT: 32 x 32 RGB, 36 classes and no class (36), v-prediction; float32, eval mode, on the
    CPU.
    """
    return DiT.from_checkpoint(weights_path("glyph-dit.safetensors"))


def load_classifier() -> "GlyphClassifier":
    """The shipped classifier of Glyphs-36, in eval mode, on the CPU."""
    with needs_extra("demo"):
        from safetensors.torch import load_file
    from fastcache.workshop.glyphs.classifier import GlyphClassifier

    model = GlyphClassifier()
    model.load_state_dict(load_file(weights_path("glyph-classifier.safetensors")))
    return model.eval()


def weights_path(name: str) -> Path:
    """The file `name` in the folder FASTCACHE_WEIGHTS if that is set, else in the checkout's `weights/`.

    Raises FileNotFoundError, which says how to get the file.
    """
    folder = os.environ.get("FASTCACHE_WEIGHTS")
    path = (Path(folder) if folder else Path(__file__).parents[3] / "weights") / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. The shipped models are not part of an installed package: set"
            " FASTCACHE_WEIGHTS to the folder weights/ of a checkout, or make them in a folder DIR and set it"
            f" to that: {MAKE_COMMANDS[name]} --out DIR/{name}"
        )
    return path
