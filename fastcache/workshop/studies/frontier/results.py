"""Results on disk: one pair of files per setting, recognised by a fingerprint of all that it depends on."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1  # of a result; raise it when a field changes its meaning


@dataclass(frozen=True)
class FrontierRow:
    """One setting's point. Speedups are against uncached batches that took turns with its own."""

    setting: str
    method: str
    interval: int | None
    usual: bool  # stands for its method at its interval
    policy: dict[str, object]
    pictures: int
    frechet_distance: float  # to the real pictures
    accuracy: float  # share of pictures that the classifier reads as their class
    psnr_db: float | None  # mean over pictures, against the uncached pictures; None for those
    seconds_per_picture: float  # median over compared batches
    uncached_seconds_per_picture: float  # the same of the uncached batches between them
    speedup: float  # the ratio of these two
    speedup_of_fastest: float
    ideal_speedup: float  # uncached FLOPs / planned FLOPs
    quotient: float  # speedup / ideal_speedup
    batch_seconds: list[float]  # per picture, of the compared batches
    uncached_batch_seconds: list[float]
    step_kinds: dict[str, int]  # of one generation
    feature_bytes: int


@dataclass(frozen=True)
class Store:
    """The results in a folder. A result is written whole or not at all."""

    folder: Path

    def row(self, slug: str, fingerprint: str) -> FrontierRow | None:
        """The finished result of a setting; None if there is none, or one of another fingerprint."""
        found = self._record(slug)
        return (
            FrontierRow(**found["row"]) if found is not None and found["fingerprint"] == fingerprint else None
        )

    def stale(self, slug: str, fingerprint: str) -> bool:
        """True if there is a result, made by something else."""
        found = self._record(slug)
        return found is not None and found["fingerprint"] != fingerprint

    def features(self, slug: str) -> np.ndarray:
        """The classifier's features [n, 64] of a finished setting's pictures."""
        with np.load(self.folder / f"{slug}.npz") as kept:
            return kept["features"]

    def pictures(self, slug: str) -> Tensor:
        """The pictures [n, 3, 32, 32] of a finished setting, in [-1, 1], float32 as they were."""
        with np.load(self.folder / f"{slug}.npz") as kept:
            return torch.from_numpy(kept["pictures"])

    def write(self, slug: str, fingerprint: str, row: FrontierRow, arrays: Mapping[str, np.ndarray]) -> None:
        """The arrays first: a result counts as finished once its record is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / f"{slug}.json"
        record.unlink(missing_ok=True)
        write_whole(self.folder / f"{slug}.npz", lambda path: _save_arrays(path, arrays))
        text = json.dumps({"fingerprint": fingerprint, "row": asdict(row)}, indent=2) + "\n"
        write_whole(record, lambda path: path.write_text(text))

    def _record(self, slug: str) -> dict[str, Any] | None:
        path = self.folder / f"{slug}.json"
        return json.loads(path.read_text()) if path.exists() else None


def fingerprint_of(**parts: object) -> str:
    """A digest of everything that a result depends on, as JSON can hold it."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write` gets another path in the same folder; the file appears under its own name when it is
    complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    write(partial)
    os.replace(partial, path)


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # names of ours, never allow_pickle
