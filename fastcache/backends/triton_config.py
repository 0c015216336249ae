"""Launch configurations of the Triton kernels: the legal set and the heuristic, apart from the kernels.

`tuning.py` looks for a measured configuration first. Both kernels compile once per configuration, so
the heuristics choose among few.
"""

from dataclasses import dataclass

import torch

SUM_COLUMNS = 128  # one fp32 tile column per lane quad: 256-byte row segments in bf16
PROGRAMS_WANTED = 528  # four a multiprocessor of an H200


@dataclass(frozen=True)
class SumConfig:
    """Tile of `sum_kernel`. At least 8 elements a thread, or loads are narrower than 16 bytes."""

    rows: int
    columns: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.rows * self.columns < 8 * 32 * self.warps:
            raise ValueError(
                f"rows, columns, warps: expected 8 elements a thread or more, got {self.rows} x"
                f" {self.columns} over {self.warps} warps"
            )


@dataclass(frozen=True)
class RowConfig:
    """Width and warps of `row_kernel`."""

    columns: int
    warps: int
    stages: int


# unpipelined tiles of 4 and 8 rows put 8 bytes on the stack on sm_80, so they are left out
SUM_CONFIGS = tuple(
    SumConfig(rows, SUM_COLUMNS, warps, stages)
    for rows, warps, depths in (
        (2, 1, (1, 3, 4)),
        (4, 2, (3, 4)),
        (8, 4, (3, 4)),
        (16, 4, (1, 3, 4)),
        (16, 8, (1, 3, 4)),
    )
    for stages in depths
)


def legal_sum_configs() -> tuple[SumConfig, ...]:
    """What the tuner may choose among."""
    return SUM_CONFIGS


def legal_row_configs(D: int) -> tuple[RowConfig, ...]:
    """The power of two that covers D, over warps that give a thread 4 to 64 elements."""
    columns = row_config(D).columns
    return tuple(
        RowConfig(columns, warps, 1)
        for warps in (1, 2, 4, 8, 16)
        if 4 <= columns // (32 * warps) <= 64 or warps == row_config(D).warps
    )


def sum_config(B: int, N: int, D: int, terms: int, float8: bool = False) -> SumConfig:
    """The largest tile that still gives every multiprocessor several programs; pipelined from 3 terms up.

    float8 features go through 8 warps in the largest tile: unpacked by 4, they reach the stack on sm_100.
    """
    columns = -(-D // SUM_COLUMNS)
    largest = (16, 8 if float8 else 4)
    tiles = (largest, (8, 4), (4, 2)) if terms > 2 else (largest,)
    for rows, warps in tiles:
        if B * -(-N // rows) * columns >= PROGRAMS_WANTED:
            return SumConfig(rows, SUM_COLUMNS, warps, 4 if terms > 2 else 1)
    return SumConfig(2, SUM_COLUMNS, 1, 4 if terms > 2 else 1)


def row_config(D: int) -> RowConfig:
    """A power of two that covers D; about 16 elements a thread, as few registers as that allows."""
    columns = max(16, 1 << (D - 1).bit_length())
    warps = (
        1
        if columns <= 512
        else 2
        if columns <= 1024
        else 4
        if columns <= 2048
        else 8
        if columns <= 4096
        else 16
    )
    return RowConfig(columns, warps, 1)


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of `received_kernel`: keys are the rows of the product, 16 or more a warp; queries are looped
    over.
    """

    keys: int
    queries: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        if self.keys < 16 * self.warps or self.queries < 16:
            raise ValueError(
                f"keys, queries, warps: expected 16 keys a warp and 16 queries or more, got {self.keys} x"
                f" {self.queries} over {self.warps} warps"
            )


NARROW_ATTENTION = AttentionConfig(64, 64, 4, 3)  # few keys: more programs
WIDE_ATTENTION = AttentionConfig(128, 64, 8, 3)  # many keys: q is read half as often
EXACT_ATTENTION = AttentionConfig(
    64, 16, 4, 2
)  # float32 without tensor cores: the product is held in registers
ATTENTION_CONFIGS = (NARROW_ATTENTION, WIDE_ATTENTION, EXACT_ATTENTION)
MANY_KEYS = 1024


def attention_config(dtype: torch.dtype, d: int, M: int) -> AttentionConfig:
    """float32 is computed exactly; 16-bit types on tensor cores, in wide tiles where there are enough of
    them.
    """
    if dtype is torch.float32:
        return EXACT_ATTENTION
    return WIDE_ATTENTION if M >= MANY_KEYS else NARROW_ATTENTION


def head_split(d: int) -> tuple[int, int]:
    """Columns of the head and of its tail: powers of two of 16 or more that together hold d; tail 0: none."""
    whole = max(16, 1 << (d - 1).bit_length())
    head = whole // 2
    tail = max(16, 1 << max(0, d - head - 1).bit_length())
    return (head, tail) if head >= 16 and head + tail < whole else (whole, 0)
