"""Glyphs-36: a class-conditional picture set that needs no download.

36 classes (A-Z, 0-9), 32 x 32 RGB, drawn with Pillow in the free fonts that matplotlib ships
(DejaVu): bright ink on a dark ground, with random font, size, rotation, position and colours.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcache.extras import needs_extra

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIZE = 32
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
)
OVERSAMPLING = 4  # drawn large, then shrunk: smooth edges


def make(per_class: int, seed: int, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [36 * per_class, 32, 32, 3] uint8 and labels [36 * per_class] int64, shuffled; a pure function
    of `seed`.
    """
    with needs_extra("demo"):
        from tqdm import tqdm
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), per_class))
    pictures = [
        render(int(label), rng)
        for label in tqdm(labels, desc="drawing glyphs", unit="picture", disable=not progress)
    ]
    return np.stack(pictures), labels


def render(label: int, rng: np.random.Generator) -> np.ndarray:
    """One uint8 picture [32, 32, 3] of class `label` (0..35)."""
    with needs_extra("demo"):
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    side = SIZE * OVERSAMPLING
    directory = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(
        directory / FONTS[rng.integers(len(FONTS))], int(side * rng.uniform(0.72, 0.92))
    )
    mask = Image.new("L", (side, side), 0)
    centre = side / 2 + rng.uniform(-0.05, 0.05, 2) * side
    ImageDraw.Draw(mask).text(tuple(centre), CLASSES[label], fill=255, font=font, anchor="mm")
    mask = mask.rotate(rng.uniform(-9, 9), resample=Image.Resampling.BILINEAR).resize(
        (SIZE, SIZE), Image.Resampling.LANCZOS
    )
    coverage = np.asarray(mask, np.float32)[..., None] / 255
    background, ink = rng.integers(0, 100, 3), rng.integers(155, 256, 3)
    return np.rint(background * (1 - coverage) + ink * coverage).astype(np.uint8)


def to_model_range(pictures: np.ndarray) -> Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(pictures: Tensor) -> np.ndarray:
    """float [n, C, S, S], meant for [-1, 1], clipped -> uint8 [n, S, S, C]."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
