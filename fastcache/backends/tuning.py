"""Measured launch configurations: which entry of a table applies to a call. The heuristics come after it.

A table is JSON, made by `python -m benchmarks.tune` on the device it is for. The file is
`FASTCACHE_TUNING=<path>`, else `tuned.json` beside this module if it is there; `FASTCACHE_TUNING=0`
leaves everything to the heuristics. A file that was named and cannot be read is an error. An entry
that is not legal, or that was measured with other kernels, is left out with a warning that says so.

Calls share an entry if they have the same kernel, device name, D, dtype of x, term bucket (up to 2,
16, 64 or 1,024 features) and row bucket (B * N up to the next power of four).
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.backends.cuda_config import CudaKernels, RowConfig as CudaRow, SumConfig as CudaSum
from fastcache.backends.index_errors import loaded_cuda
from fastcache.backends.library import PACKAGE
from fastcache.backends.triton_config import (
    RowConfig as TritonRow,
    SumConfig as TritonSum,
    legal_row_configs,
    legal_sum_configs,
)
from fastcache.backends.tuning_key import Key

logger = logging.getLogger(__name__)

FORMAT = 1
SHIPPED = Path(__file__).with_name("tuned.json")
CONFIGS = {"triton.sum": TritonSum, "triton.row": TritonRow, "cuda.sum": CudaSum, "cuda.row": CudaRow}

Config = TritonSum | TritonRow | CudaSum | CudaRow


class TuningError(RuntimeError):
    """A tuning table was named that cannot be used."""


@functools.cache
def triton_digest() -> str:
    """Of the Triton kernels: a table that was measured with others is stale."""
    return hashlib.sha256((PACKAGE / "kernels" / "residual_update.py").read_bytes()).hexdigest()[:16]


def kernel_versions(cuda: CudaKernels | None) -> dict[str, str]:
    """What a table must have been measured with, by backend. None: the backend is not in this process."""
    return {"triton": triton_digest()} | ({} if cuda is None else {"cuda": cuda.version})


def legal_configs(key: Key, cuda: CudaKernels | None) -> tuple[Config, ...]:
    """What may be measured for a key, on the kernels of this process."""
    if key.kernel == "triton.sum":
        return legal_sum_configs()
    if key.kernel == "triton.row":
        return legal_row_configs(key.channels)
    return () if cuda is None else cuda.legal(key)


@dataclass(frozen=True)
class Entry:
    """One measured choice: its median, and that of the heuristic's choice, in microseconds."""

    key: Key
    config: Config
    median_us: float
    heuristic_us: float


def encoded(entries: list[Entry], versions: Mapping[str, str]) -> dict[str, Any]:
    """A table as JSON has it."""
    rows = [
        asdict(entry.key)
        | {
            "config": asdict(entry.config),
            "median_us": entry.median_us,
            "heuristic_us": entry.heuristic_us,
        }
        for entry in entries
    ]
    return {"format": FORMAT, "kernels": dict(versions), "entries": rows}


def decoded(table: object, source: str, cuda: CudaKernels | None) -> dict[Key, Config]:
    """The usable entries of a table; every other one is named in a warning. Raises TuningError if it is no
    table.
    """
    if (
        not isinstance(table, dict)
        or table.get("format") != FORMAT
        or not isinstance(table.get("entries"), list)
        or not isinstance(table.get("kernels"), dict)
    ):
        raise TuningError(
            f"{source}: expected a tuning table of format {FORMAT} with kernels and entries; make one with"
            " `python -m benchmarks.tune`"
        )
    versions = kernel_versions(cuda)
    usable: dict[Key, Config] = {}
    refused: dict[str, list[int]] = {}
    for number, row in enumerate(table["entries"]):
        try:
            key = Key(*(row[name] for name in Key.__dataclass_fields__))
            backend = key.kernel.partition(".")[0]
            if backend in versions and table["kernels"].get(backend) != versions[backend]:
                raise ValueError(
                    f"measured with other {backend} kernels ({table['kernels'].get(backend)}, these are"
                    f" {versions[backend]})"
                )
            config = CONFIGS[key.kernel](**row["config"])
            if backend in versions and config not in legal_configs(key, cuda):
                raise ValueError(f"{config} is not legal for {key}")
            usable[key] = config
        except (KeyError, TypeError, ValueError) as error:
            named = isinstance(error, (KeyError, TypeError))
            refused.setdefault(f"{type(error).__name__}: {error}" if named else str(error), []).append(number)
    for reason, numbers in refused.items():
        logger.warning(
            "%s: entries %s are not used, the heuristic decides there: %s. Measure again with `python -m"
            " benchmarks.tune`",
            source,
            ", ".join(map(str, numbers)),
            reason,
        )
    return usable


def read_table(cuda: CudaKernels | None) -> dict[Key, Config]:
    """The table that FASTCACHE_TUNING names, or the shipped one; {} if there is none."""
    named = os.environ.get("FASTCACHE_TUNING", "")
    if named == "0":
        return {}
    path = Path(named) if named else SHIPPED
    if not named and not path.exists():
        return {}
    source = f"FASTCACHE_TUNING={named}" if named else path.name
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as reason:
        raise TuningError(
            f"{source}: cannot be read as a tuning table ({reason}); make one with `python -m"
            " benchmarks.tune`, or set FASTCACHE_TUNING=0"
        ) from reason
    return decoded(table, source, cuda)


def table() -> Mapping[Key, Config]:
    """The table of this process, read once."""
    return _REPLACED[-1] if _REPLACED else _own_table()


@functools.cache
def _own_table() -> Mapping[Key, Config]:
    library = loaded_cuda()
    return read_table(None if library is None else CudaKernels(library))


@contextmanager
def only(entries: Mapping[Key, Config], device: torch.device) -> Iterator[None]:
    """Use these entries and no others on `device` while this lasts; for the tuner, which measures one after
    the other.

    It acts on the whole process. Raises ValueError if a CUDA entry is not legal.
    """
    _REPLACED.append(dict(entries))
    try:
        _hand_over(device)
        yield
    finally:
        _REPLACED.pop()
        _hand_over(device)


_REPLACED: list[dict[Key, Config]] = []  # tables that `only` puts in the place of the process's own


def _hand_over(device: torch.device) -> None:
    tuned.cache_clear()
    ready.cache_clear()
    library = loaded_cuda()
    if library is not None:
        CudaKernels(library).forget()
    ready(device)


@functools.lru_cache(maxsize=4096)
def tuned(
    kernel: str, device: torch.device, channels: int, dtype: torch.dtype, terms: int, rows: int
) -> Config | None:
    """The entry for calls of these buckets, None if the heuristic decides."""
    if not table():
        return None
    return table().get(
        Key(kernel, device_name(device), channels, str(dtype).removeprefix("torch."), terms, rows)
    )


def device_name(device: torch.device) -> str:
    """The name that a table knows a device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def ready(device: torch.device) -> None:
    """Read the table, and give the compiled launcher the entries of one device; once. Raises TuningError."""
    library = loaded_cuda() if table() else None
    if library is None:
        return
    kernels, name = CudaKernels(library), device_name(device)
    for key, config in table().items():
        if key.device == name and isinstance(config, (CudaSum, CudaRow)):
            kernels.use(key, config, device.index or 0)
