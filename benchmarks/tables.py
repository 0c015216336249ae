"""Markdown tables of rows as they are in the JSON, and notes about rows that are not to be believed so.

A table is its column names: COLUMNS says where in a row each is found and how it is shown. A column in which
no row has anything is left out.
"""

from collections.abc import Iterable, Sequence

from benchmarks.contest import Row
from benchmarks.sequences import COMPARED

NOISY = 1.5  # p90 over p10 beyond which a median is marked
APART = 1.15  # wall over CPU ratio, and measured over ideal, beyond which a row gets a note
OURS = ("fastcache", "fastcache cuda", "fastcache triton")
# field (dots go into fields of it), format, factor
COLUMNS = {
    "K": ("rows", "d"),
    "MB": ("bytes", ".1f", 1e-6),
    "us": ("timing.median_us", ".1f"),
    "p10": ("timing.p10_us", ".1f"),
    "p90": ("timing.p90_us", ".1f"),
    "best": ("timing.best_us", ".1f"),
    "CPU us": ("timing.cpu_us", ".1f"),
    "rounds": ("timing.rounds", "d"),
    "GB/s": ("gbps", ".1f"),
    "of copy": ("share_of_copy", ".0%"),
    "of datasheet": ("share_of_datasheet", ".0%"),
    "GFLOP/s": ("gflops", ".0f"),
    "beside the MLP us": ("beside_us", ".0f"),
    "host us": ("host_us", ".1f"),
    "launches": ("launches", "d"),
    "operators": ("operators", "d"),
    "error": ("error", ".0e"),
    "ms": ("timing.median_us", ".2f", 1e-3),
    "generation ms": ("generation.median_us", ".2f", 1e-3),
    "begin ms": ("begin.median_us", ".2f", 1e-3),
    "typical ms": ("typical_us", ".2f", 1e-3),
    "CPU ms": ("cpu_us", ".2f", 1e-3),
    "measured x": ("speedup", ".2f"),
    "by CPU time": ("cpu_speedup", ".2f"),
    "ideal x": ("ideal", ".2f"),
    "measured / ideal": ("quotient", ".2f"),
    "of uncached": ("of_uncached", ".2f"),
    "of FLOPs": ("of_flops", ".2f"),
    "peak GB": ("peak_bytes", ".2f", 1e-9),
    "copy GB/s": ("copy_gbps", ".1f"),
    "read GB/s": ("read_gbps", ".1f"),
    "buffer MB": ("buffer_bytes", ".0f", 1e-6),
    "replay us": ("replay.median_us", ".1f"),
    "floor us": ("floor_us", ".1f"),
    "target us": ("target_us", ".1f"),
    "target": ("target", ".0%"),
    **{f"x {other}": (key, ".2f") for key, other in COMPARED.items()},
}
RATIOS = tuple(f"x {other}" for other in COMPARED.values())


def is_noisy(timing: Row) -> bool:
    """True if the middle 80 % of the samples are far apart."""
    return timing["p90_us"] > NOISY * timing["p10_us"]


def cell(row: Row, column: str) -> str:
    """A number as COLUMNS says: `-` for None, `~` after a noisy median, bold where FastCache is slower."""
    path, form, *factor = COLUMNS.get(column, (column, ""))
    value, holder = row, row
    for name in path.split("."):
        value, holder = value.get(name) if value else None, value
    if value is None or (column == "K" and not value):
        return "-"
    text = format(value * factor[0] if factor else value, form)
    if path.endswith("median_us"):
        return text + "~" * is_noisy(holder)
    return f"**{text}**" if path in COMPARED and row["contender"] in OURS and value < 1 else text


def section(heading: str, columns: Sequence[str], rows: Sequence[Row], *text: str) -> list[str]:
    """A heading, lines of text and a table; nothing without rows."""
    cells = {column: [cell(row, column) for row in rows] for column in columns}
    cells = {column: found for column, found in cells.items() if any(one != "-" for one in found)}
    lines = [cells, ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return listing(heading, table if rows else [], *text)


def listing(heading: str, lines: Sequence[str], *text: str) -> list[str]:
    """A heading, lines of text and lines; nothing without lines."""
    texts = [part for one in text if one for part in (one, "")]
    return [f"## {heading}", "", *texts, *lines, ""] if lines else []


def lost(rows: Sequence[Row]) -> list[str]:
    """Every comparison that FastCache lost."""
    ours = [row for row in rows if row["contender"] in OURS]
    compared = [(row[key], other, row) for row in ours for key, other in COMPARED.items() if row.get(key)]
    found = sorted((one for one in compared if one[0] < 1), key=lambda one: one[0])
    what = lambda row, other: f"- {row['case']}, {row['contender']}: {other} is"
    lines = [f"{what(row, other)} {1 / ratio:.2f}x faster" for ratio, other, row in found]
    return listing(f"Lost: {len(found)} of {len(compared)} comparisons", lines or ["none"] if ours else [])


def absences(absent: Iterable[Row]) -> list[str]:
    """What was not measured, by who and why."""
    by_reason: dict[str, list[str]] = {}
    for one in absent:
        why = f"- {one['provider'] or 'all contenders'}: {one['reason']}"
        by_reason.setdefault(why, []).append(one["case"])
    return listing("Not measured", [f"{why}: {', '.join(cases)}" for why, cases in by_reason.items()])


# --- what is not to be believed as it stands -----------------------------------------------------------


def case_notes(rows: Sequence[Row], read_gbps: float) -> list[str]:
    """About rows of ours whose ratio differs between the clocks, or that beat the copy by far."""
    lines = []
    for row in (row for row in rows if row["contender"] in OURS):
        name, share = f"{row['case']}, {row['contender']}", row.get("share_of_copy") or 0
        if noise := _noise(row.get("vs_naive"), row.get("cpu_vs_naive")):
            lines.append(f"- {name}: x naive is {noise}")
        if share > APART:
            why = "noise: no memory of this machine is that fast"
            if row["gbps"] <= APART * read_gbps:
                why = f"it mostly reads, and reading gives {read_gbps:.1f} GB/s"
            why = "its operands were in a cache" if row["cache"] == "warm" else why
            lines.append(f"- {name}: {share:.0%} of the copy bandwidth: {why}")
    return lines


def method_notes(rows: Sequence[Row]) -> list[str]:
    """About rows whose speedup differs between the clocks, or is beyond what FLOPs promise."""
    lines = []
    full = {row["model"]: row["kinds"][0] for row in rows if row["way"] == "host"}
    for row in (row for row in rows if row["speedup"]):
        name = f"{row['model']}, {row['method']}, {row['way']}"
        noise = _noise(row["speedup"], row["cpu_speedup"])
        if noise:
            lines.append(f"- {name}: the speedup is {noise}")
        elif row["quotient"] > APART:
            parts = [part for kind in row["kinds"] if (part := _cheaper(kind, full[row["model"]]))]
            why = "; ".join(parts) if parts else "noise: no kind of step is cheaper than its FLOPs"
            cpu = f"{row['cpu_speedup'] / row['ideal']:.2f} by CPU time"
            lines.append(f"- {name}: {row['quotient']:.2f} of ideal ({cpu}): {why}")
    return lines


def _noise(wall: float | None, cpu: float | None) -> str:
    if wall is None or cpu is None or max(wall, cpu) <= APART * min(wall, cpu):
        return ""
    return f"noise: {wall:.2f} by wall time and {cpu:.2f} by CPU time"


def _cheaper(kind: Row, full: Row) -> str:
    """How a step costs less than its share of the FLOPs, which are those of matrix multiplies alone."""
    share, flops = kind["of_uncached"], kind["of_flops"]
    if share >= flops:
        return ""
    cost = "operators" if "operators" in full else "launches"
    saved = f"{full.get(cost)} {cost} of an uncached step are {kind.get(cost)}"
    taken = f"a {kind['kind']} step takes {share:.0%} of an uncached one and {flops:.0%} of its FLOPs"
    return f"{taken}, as {saved}"
