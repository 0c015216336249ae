"""Results on disk: one pair of files per setting, recognised by a fingerprint of all that it depends on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastcache.files.arrays import read_arrays, write_arrays
from fastcache.files.damaged import set_aside
from fastcache.files.json_text import read_json
from fastcache.files.whole import write_text_whole

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
        found = self._result(slug)
        return found.row if found is not None and found.fingerprint == fingerprint else None

    def stale(self, slug: str, fingerprint: str) -> bool:
        """True if there is a result, made by something else."""
        found = self._result(slug)
        return found is not None and found.fingerprint != fingerprint

    def features(self, slug: str) -> np.ndarray:
        """The classifier's features [n, 64] of a finished setting's pictures."""
        return read_arrays(self._arrays(slug), ("features",))["features"]

    def pictures(self, slug: str) -> Tensor:
        """The pictures [n, 3, 32, 32] of a finished setting, in [-1, 1], float32 as they were."""
        return torch.from_numpy(read_arrays(self._arrays(slug), ("pictures",))["pictures"])

    def write(self, slug: str, fingerprint: str, row: FrontierRow, arrays: Mapping[str, np.ndarray]) -> None:
        """The arrays first: a result counts as finished once its record is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self._record(slug)
        record.unlink(missing_ok=True)
        write_arrays(self._arrays(slug), arrays)
        text = json.dumps({"fingerprint": fingerprint, "row": asdict(row)}, indent=2) + "\n"
        write_text_whole(record, text)

    def _record(self, slug: str) -> Path:
        return self.folder / f"{slug}.json"

    def _arrays(self, slug: str) -> Path:
        return self.folder / f"{slug}.npz"

    def _result(self, slug: str) -> "_Result | None":
        """What is there of a setting; None if nothing is, or nothing that can be read to its end."""
        record, arrays = self._record(slug), self._arrays(slug)
        if not record.exists():
            return None
        try:
            found = _Result.from_json(read_json(record))
        except ValueError as error:
            set_aside(record, error)
            return None
        try:
            if not arrays.exists():
                raise ValueError(f"{arrays.name}, which belongs to it, is absent")
            read_arrays(arrays, ("features",))
        except ValueError as error:
            if arrays.exists():
                set_aside(arrays, error)
            set_aside(record, f"its arrays: {error}")
            return None
        return found


@dataclass(frozen=True)
class _Result:
    fingerprint: str
    row: FrontierRow

    @staticmethod
    def from_json(found: object) -> "_Result":
        try:
            return _Result(str(found["fingerprint"]), FrontierRow(**found["row"]))  # type: ignore[index]
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a result of this version: {error}") from error


def fingerprint_of(**parts: object) -> str:
    """A digest of everything that a result depends on, as JSON can hold it."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()
