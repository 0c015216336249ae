"""Measure every legal launch configuration on this GPU, and write the table that goes before the heuristics.

    python -m benchmarks.tune --out tuned.json [--kernels cuda.sum triton.sum] [--channels 1152 3072]
    FASTCACHE_TUNING=tuned.json python ...        # use it

An entry is written only where a configuration beats the heuristic's choice by more than NOISE; the file is
complete after every key. fastcache/backends/tuning.py says what a key is, and when a table is stale.
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import fastcache
from benchmarks.cases import Case, Form, Size
from benchmarks.contest import Prepared
from benchmarks.gate.stage import write_json
from benchmarks.operands import Operands
from benchmarks.sequences import relative_rms
from benchmarks.timing import Effort, captured, measure
from fastcache.backends import tuning
from fastcache.backends.cuda_config import CudaKernels
from fastcache.backends.index_errors import loaded_cuda
from fastcache.backends.tuning import CONFIGS, Config, Entry, encoded, legal_configs
from fastcache.backends.tuning_key import DTYPES, Key
from fastcache.ops import Norm, residual_update

HEURISTIC = "heuristic"
NOISE = 0.02  # share by which a configuration must be faster
CHANNELS = (1152, 3072, 5120)
TERMS = {0: 1, 1: 5, 2: 56, 3: 128}  # features that stand for a bucket
SUM_TERMS, ROW_TERMS = (0, 1, 2, 3), (0, 1)
ROWS = (5, 6, 7, 8)  # buckets: up to 1,024, 4,096, 16,384 and 65,536 rows
MOST_BYTES = 24e9  # of operands
ALLOWED_ERROR = 1e-2  # relative RMS against eager: no configuration may compute something else
EFFORT = Effort(0.3, 15, 60)

# microseconds of each configuration; None: the heuristic's
Clock = Callable[[Key, Mapping[str, Config | None]], dict[str, float]]


def keys(kernels: Iterable[str], channels: Iterable[int], dtypes: Iterable[str], device: str) -> list[Key]:
    """What is measured, small before large."""
    found = [
        Key(kernel, device, width, dtype, terms, rows)
        for rows, width, dtype, kernel in itertools.product(ROWS, channels, dtypes, kernels)
        for terms in (SUM_TERMS if kernel.endswith("sum") else ROW_TERMS)
    ]
    return [key for key in found if case_of(key).tensor_bytes * (TERMS[key.terms] + 2) <= MOST_BYTES]


def tune(
    wanted: Sequence[Key],
    cuda: CudaKernels | None,
    clock: Clock,
    save: Callable[[list[Entry]], None],
    deadline: float = float("inf"),
) -> list[Entry]:
    """The entries that beat the heuristic; `save` gets all of them after every key."""
    entries: list[Entry] = []
    for number, key in enumerate(wanted, start=1):
        if time.monotonic() > deadline:
            print(f"the budget was used up before {len(wanted) - number + 1} of {len(wanted)} keys")
            break
        legal = {str(config): config for config in legal_configs(key, cuda)}
        if not legal:
            continue
        found = clock(key, {HEURISTIC: None, **legal})
        names = [name for name in legal if name in found]
        if HEURISTIC not in found or not names:
            print(f"{number}/{len(wanted)} {key}: not measured")
            continue
        best = min(names, key=found.__getitem__)
        better = found[best] < (1 - NOISE) * found[HEURISTIC]
        if better:
            entries.append(Entry(key, legal[best], found[best], found[HEURISTIC]))
        save(entries)
        against = f"heuristic {found[HEURISTIC]:.1f} us{', kept' if better else ''}"
        print(f"{number}/{len(wanted)} {key}: {best} {found[best]:.1f} us, {against}")
    return entries


def case_of(key: Key) -> Case:
    """A call that stands for a key: as many rows as its bucket holds, in two samples."""
    batch = 2 if key.rows else 1
    size = Size("tuning", batch, 4**key.rows // batch, key.channels, TERMS[key.terms])
    return Case(Form.TRUNK, size, getattr(torch, key.dtype))


def call_of(key: Key, i: Operands) -> Callable[[], object]:
    """The call on given operands: a trunk sum, or the same with LayerNorm and modulation."""
    trunk = partial(residual_update, i.x, i.features, i.table, gate_index=i.gate_index)
    modulated = {} if key.kernel.endswith("sum") else {"norm": Norm.LAYER, "shift": i.shift, "scale": i.scale}
    return partial(trunk, **modulated)


def graph_clock(device: torch.device, effort: Effort = EFFORT, backend: str | None = None) -> Clock:
    """Times by graph replay, all configurations in turns; one with wrong values is left out.

    backend: runs all keys, for a rehearsal; None: the one that a key's kernel belongs to.
    """

    def clock(key: Key, configs: Mapping[str, Config | None]) -> dict[str, float]:
        case = case_of(key)
        buffers = Prepared(case, device, **({} if device.type == "cuda" else {"max_copies": 2})).buffers
        with fastcache.use_backend("eager"):
            expected = call_of(key, buffers[0])()
        replays = {}
        for name, config in configs.items():
            chosen = fastcache.use_backend(backend or key.kernel.partition(".")[0])
            with tuning.only({} if config is None else {key: config}, device), chosen:
                calls = [call_of(key, operands) for operands in buffers]
                pairs = zip(calls[0](), expected, strict=True)
                error = max(relative_rms(one, other) for one, other in pairs if other is not None)
                if not error <= ALLOWED_ERROR:
                    print(f"{name} is off by {error:.1e} and left out: this is a bug, report it")
                    continue
                replays[name] = [captured(calls, device, 1e-3 * case.min_bytes / 4000)]
        timings = measure(replays, effort, device)
        del replays, buffers
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {name: timing.median_us for name, timing in timings.items()}

    return clock


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    text = "Measure launch configurations on this GPU and write a table of the best."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=text)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", nargs="+", choices=tuple(CONFIGS), default=tuple(CONFIGS))
    parser.add_argument("--channels", nargs="+", type=int, default=CHANNELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bfloat16",))
    parser.add_argument("--seconds", type=float, default=480.0, help="after which no further key is begun")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("python -m benchmarks.tune: PyTorch sees no GPU, and a table is made by measuring on one")
    device, status, library = torch.device("cuda"), fastcache.backends_status(), loaded_cuda()
    kernels = [name for name in options.kernels if status[name.partition(".")[0]].available]
    cuda = None if library is None else CudaKernels(library)
    wanted = keys(kernels, options.channels, options.dtypes, tuning.device_name(device))
    save = lambda found: write_json(options.out, encoded(found, tuning.kernel_versions(cuda)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        deadline = time.monotonic() + options.seconds
        entries = tune(wanted, cuda, graph_clock(device), save, deadline)
    print(f"{len(entries)} entries in {options.out.name}; use them with FASTCACHE_TUNING={options.out.name}")


if __name__ == "__main__":
    main()
