"""A labelled grid of pictures as a PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcache.extras import needs_extra
from fastcache.files.whole import write_whole

COLUMNS = 18
SCALE = 2  # screen pixels per picture pixel
LABEL_WIDTH = 250
GAP = 16  # between rows of the grid
TITLE_SIZE, CAPTION_SIZE = 22, 16


@dataclass(frozen=True)
class GridRow:
    """`pictures` [n, S, S, 3] uint8 with a title and some lines of text to their left."""

    title: str
    captions: Sequence[str]
    pictures: np.ndarray


def draw_grid(rows: Sequence[GridRow], path: Path) -> None:
    """One band per row, each in lines of 18 pictures, to `path`. Needs Pillow and matplotlib's fonts (extra
    `demo`).
    """
    with needs_extra("demo"):
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    title_font, caption_font = ImageFont.truetype(font, TITLE_SIZE), ImageFont.truetype(font, CAPTION_SIZE)
    bands = [_tile(row.pictures) for row in rows]
    width = LABEL_WIDTH + max(band.shape[1] for band in bands)
    canvas = Image.new("RGB", (width, sum(band.shape[0] + GAP for band in bands) + GAP), "white")
    pen, top = ImageDraw.Draw(canvas), GAP
    for row, band in zip(rows, bands, strict=True):
        canvas.paste(Image.fromarray(band), (LABEL_WIDTH, top))
        pen.text((GAP, top), row.title, fill="black", font=title_font)
        for line, caption in enumerate(row.captions):
            pen.text((GAP, top + 30 + 22 * line), caption, fill="#555555", font=caption_font)
        top += band.shape[0] + GAP
    write_whole(path, lambda partial: canvas.save(partial, format="PNG"))


def _tile(pictures: np.ndarray) -> np.ndarray:
    """[n, S, S, 3] -> one picture of lines of 18, enlarged without smoothing; missing ones are white."""
    lines = -(-len(pictures) // COLUMNS)
    side = pictures.shape[1]
    padded = np.full((lines * COLUMNS, side, side, 3), 255, np.uint8)
    padded[: len(pictures)] = pictures
    tiled = (
        padded.reshape(lines, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(lines * side, COLUMNS * side, 3)
    )
    return tiled.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
