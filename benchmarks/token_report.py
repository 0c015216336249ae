"""Tables of the part `tokens`."""

from collections.abc import Sequence

from benchmarks.tables import bold_below_one, mark, microseconds, table, times
from benchmarks.token_cases import Work
from benchmarks.tokens import MLP_ALONE, BlockRow, ChoiceRow


def token_sections(blocks: Sequence[BlockRow], choices: Sequence[ChoiceRow]) -> list[str]:
    """Partial blocks by work, then the choice of a step."""
    lines = []
    for work in Work:
        rows = [row for row in blocks if row.work == work.value]
        if rows:
            lines += [f"## Partial block, {work.value}: {work.meaning}", "", *_blocks(rows)]
    if choices:
        lines += [
            f"## Choice of tokens for {choices[0].layers} layers of a step, float32 scores",
            "",
            *_choices(choices),
        ]
    return lines


def _blocks(rows: Sequence[BlockRow]) -> list[str]:
    alone = {row.case: row.timing.median_us for row in rows if row.provider == MLP_ALONE}
    headings = (
        "size",
        "K",
        "of N",
        "dtype",
        "contender",
        "MB",
        "cache",
        "median us",
        "floor us",
        "GB/s",
        *(("GFLOP/s", "beside the MLP us") if alone else ()),
        "x naive",
        "x best eager",
        "x compile",
        "error",
    )
    cells = [
        (
            row.size, row.rows, f"{row.share:.0%}", row.dtype, row.provider, f"{row.bytes / 1e6:.1f}", row.cache, microseconds(row.timing), "-" if row.floor_us is None else f"{row.floor_us:.0f}", f"{row.gbps:.1f}",
            *((f"{1e-3 * row.flops / row.timing.median_us:.0f}", f"{row.timing.median_us - alone[row.case]:.0f}") if alone else ()),
            *(_ratio(row, ratio) for ratio in (row.vs_naive, row.vs_best_eager, row.vs_compile)), f"{row.error:.0e}",
        )
        for row in rows
    ]  # fmt: skip
    return table(headings, cells)


def _ratio(row: BlockRow, ratio: float | None) -> str:
    return bold_below_one(ratio) if row.provider == "fastcache" else times(ratio)


def _choices(rows: Sequence[ChoiceRow]) -> list[str]:
    headings = (
        "size",
        "contender",
        "operators",
        "MB",
        "median us",
        "floor us",
        "x naive",
        "x topk per layer",
        "same choice",
    )
    cells = [
        (
            row.size,
            row.provider,
            row.operators,
            f"{row.bytes / 1e6:.2f}",
            f"{row.timing.median_us:.0f}{mark(row.timing)}",
            "-" if row.floor_us is None else f"{row.floor_us:.0f}",
            times(row.vs_naive),
            times(row.vs_topk),
            f"{row.same:.2%}",
        )
        for row in rows
    ]
    return table(headings, cells)
