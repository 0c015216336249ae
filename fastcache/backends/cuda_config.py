"""Launch configurations of the CUDA kernels as Python sees them. The heuristic and the legal set are in
csrc/cuda/config.h.
"""

import ctypes
from dataclasses import astuple, dataclass

from fastcache.backends.tuning_key import Key

KERNELS = ("cuda.sum", "cuda.row")  # numbers of the C interface, csrc/cuda/tuning.cpp
TYPES = ("float32", "float16", "bfloat16")
MOST_CONFIGS = 64


@dataclass(frozen=True)
class SumConfig:
    """Of `sum_kernel`: columns that a thread reads at once, and its rows."""

    width: int
    rows: int


@dataclass(frozen=True)
class RowConfig:
    """Of `row_kernel`: threads of a row, column runs of a thread, columns of a run."""

    threads: int
    vectors: int
    width: int


class CudaKernels:
    """The tuning interface of a loaded library of CUDA kernels (or of the emulator that tests run)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def version(self) -> str:
        """Which kernels a table must have been measured with."""
        return str(self._library.fastcache_cuda_tuning_version())

    def legal(self, key: Key) -> tuple[SumConfig | RowConfig, ...]:
        """Every configuration that may run calls of a key."""
        numbers = (ctypes.c_int32 * (3 * MOST_CONFIGS))()
        count = self._library.fastcache_cuda_configs(
            KERNELS.index(key.kernel), TYPES.index(key.dtype), key.channels, key.terms, numbers, MOST_CONFIGS
        )
        made = SumConfig if key.kernel == "cuda.sum" else RowConfig
        size = len(made.__dataclass_fields__)
        return tuple(made(*numbers[3 * i : 3 * i + size]) for i in range(count))

    def use(self, key: Key, config: SumConfig | RowConfig, device: int) -> None:
        """Let calls of a key run with `config` from now on. Raises ValueError if it is not legal."""
        values = (ctypes.c_int32 * 3)(*astuple(config))
        if not self._library.fastcache_cuda_tune(
            KERNELS.index(key.kernel),
            device,
            TYPES.index(key.dtype),
            key.channels,
            key.terms,
            key.rows,
            values,
        ):
            raise ValueError(f"config: expected one of {', '.join(map(str, self.legal(key)))}, got {config}")

    def forget(self) -> None:
        """Leave every call to the heuristic again."""
        self._library.fastcache_cuda_untune()
