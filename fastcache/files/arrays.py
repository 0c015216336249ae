"""NumPy arrays in one compressed file, read as a whole or refused."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastcache.files.whole import write_whole


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file with these arrays, whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # a path would get another suffix
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names of ours, never allow_pickle

    write_whole(path, write)


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, `names` among them; no pickles. Raises ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            found = {name: kept[name] for name in kept.files}
    except (
        ValueError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"not an .npz file that can be read to its end: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"expected the arrays {', '.join(names)}, found no {missing[0]}")
    return found
