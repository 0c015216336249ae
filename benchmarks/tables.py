"""Markdown tables of rows as they are in the JSON, for `benchmarks.run` and `benchmarks.gate.report` alike.

A table is its column names: COLUMNS says what each shows of a row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

NOISY = 1.5  # p90 over p10 beyond which a median is marked
APART = 1.15  # wall over CPU ratio, and measured over ideal, beyond which a row gets a note
OURS = ("fastcache", "fastcache cuda", "fastcache triton")
RATIOS = {
    "naive": "vs_naive",
    "best eager": "vs_best_eager",
    "torch.compile": "vs_compile",
    "torch.compile autotuned": "vs_autotuned",
}
Row = Mapping[str, object]
Cell = Callable[[Row], object]


def is_noisy(timing: Row) -> bool:
    """True if the middle 80 % of the samples are far apart."""
    return timing["p90_us"] > NOISY * timing["p10_us"]


def shown(value: float | None, form: str = ".2f", factor: float = 1.0) -> str:
    """A number, `-` for None."""
    return "-" if value is None else format(value * factor, form)


def microseconds(timing: Row | None, form: str = ".1f", factor: float = 1.0) -> str:
    """The median, `~` if it is noisy."""
    return "-" if timing is None else shown(timing["median_us"], form, factor) + "~" * is_noisy(timing)


def _get(key: str, form: str, factor: float = 1.0) -> Cell:
    return lambda row: shown(row.get(key), form, factor)


def _time(key: str, form: str = ".1f", factor: float = 1.0) -> Cell:
    return lambda row: shown(row["timing"].get(key), form, factor)


def _ratio(key: str) -> Cell:
    def ratio(row: Row) -> str:
        value, text = row.get(key), shown(row.get(key))
        return f"**{text}**" if row["contender"] in OURS and value is not None and value < 1 else text

    return ratio


COLUMNS: dict[str, Cell] = {
    "K": lambda row: row["rows"] or "-",
    "MB": _get("bytes", ".1f", 1e-6),
    "us": lambda row: microseconds(row["timing"]),
    "p10": _time("p10_us"),
    "p90": _time("p90_us"),
    "best": _time("best_us"),
    "CPU us": _time("cpu_us"),
    "rounds": _time("rounds", ".0f"),
    "GB/s": _get("gbps", ".1f"),
    "of copy": _get("share_of_copy", ".0%"),
    "of datasheet": _get("share_of_datasheet", ".0%"),
    "GFLOP/s": lambda row: shown(1e-3 * row["flops"] / row["timing"]["median_us"] or None, ".0f"),
    "host us": _get("host_us", ".1f"),
    "launches": _get("launches", ".0f"),
    "operators": _get("operators", ".0f"),
    "extra MB": _get("extra_bytes", ".1f", 1e-6),
    "error": _get("error", ".0e"),
    "ms": lambda row: microseconds(row["timing"], ".2f", 1e-3),
    "generation ms": lambda row: microseconds(row["generation"], ".2f", 1e-3),
    "begin ms": lambda row: microseconds(row["begin"], ".2f", 1e-3),
    "typical ms": _get("typical_us", ".2f", 1e-3),
    "CPU ms": _get("cpu_us", ".2f", 1e-3),
    "measured x": _get("speedup", ".2f"),
    "by CPU time": _get("cpu_speedup", ".2f"),
    "ideal x": _get("ideal", ".2f"),
    "measured / ideal": _get("quotient", ".2f"),
    **{f"x {other}": _ratio(key) for other, key in RATIOS.items()},
}


def table(columns: Sequence[str] | Mapping[str, Cell], rows: Iterable[Row]) -> list[str]:
    """A Markdown table and an empty line; a column that COLUMNS lacks is the row's field of that name."""
    found = (
        columns
        if isinstance(columns, Mapping)
        else {name: COLUMNS.get(name, _field(name)) for name in columns}
    )
    lines = [found, ["---"] * len(found), *([cell(row) for cell in found.values()] for row in rows)]
    return [*("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]


def _field(name: str) -> Cell:
    return lambda row: "-" if row.get(name) is None else row[name]


def section(
    heading: str, columns: Sequence[str] | Mapping[str, Cell], rows: Sequence[Row], *text: str
) -> list[str]:
    """A heading, lines of text and a table; nothing without rows."""
    return (
        [f"## {heading}", "", *(line for one in text for line in (one, "")), *table(columns, rows)]
        if rows
        else []
    )


def lost(rows: Sequence[Row]) -> list[str]:
    """Every comparison that FastCache lost: with the usual contenders, and with kernels of other projects."""
    ours = [row for row in rows if row["contender"] in OURS]
    compared = [(row.get(key), other, row) for row in ours for other, key in RATIOS.items()]
    usual = (*OURS, *RATIOS, "fastcache eager", "MLP alone", "topk per layer")
    for row in ours:
        others = [other for other in rows if other["case"] == row["case"] and other["contender"] not in usual]
        medians = [(other["timing"]["median_us"], other["contender"]) for other in others]
        compared += [(median / row["timing"]["median_us"], name, row) for median, name in medians]
    compared = [one for one in compared if one[0] is not None]
    found = sorted((one for one in compared if one[0] < 1), key=lambda one: one[0])
    lines = [
        f"- {row['case']}, {row['contender']}: {other} is {1 / ratio:.2f}x faster"
        for ratio, other, row in found
    ]
    heading = f"## Lost: {len(found)} of {len(compared)} comparisons"
    return [heading, "", *(lines or ["none"]), ""] if ours else []


def absences(absent: Iterable[tuple[str | None, str, str]]) -> list[str]:
    """(who, why, what) was not measured."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for who, why, what in absent:
        by_reason.setdefault((who or "all contenders", why), []).append(what)
    lines = [f"- {who}: {why}: {', '.join(what)}" for (who, why), what in by_reason.items()]
    return ["## Not measured", "", *lines, ""] if lines else []


# --- what is not to be believed as it stands -----------------------------------------------------------


def case_notes(rows: Sequence[Row], read_gbps: float) -> list[str]:
    """A note about every row of ours whose ratio differs between the clocks, or that beats the copy by
    far."""
    lines = []
    for row in (row for row in rows if row["contender"] in OURS):
        name, share = f"{row['case']}, {row['contender']}", row.get("share_of_copy")
        if noise := _noise(row.get("vs_naive"), row.get("cpu_vs_naive")):
            lines.append(f"- {name}: x naive is {noise}")
        if share is not None and share > APART:
            known = row["cache"] == "warm"
            why = (
                "its operands were in a cache"
                if known
                else f"it mostly reads, and reading gives {read_gbps:.1f} GB/s"
            )
            why = (
                why
                if known or row["gbps"] <= APART * read_gbps
                else "noise: no memory of this machine is that fast"
            )
            lines.append(f"- {name}: {share:.0%} of the copy bandwidth: {why}")
    return lines


def method_notes(rows: Sequence[Row]) -> list[str]:
    """A note about every row whose speedup differs between the clocks, or is beyond what FLOPs promise."""
    lines = []
    uncached = {row["model"]: row for row in rows if row["method"] == "uncached"}
    for row in rows:
        name = f"{row['model']}, {row['method']}, {row['way']}"
        noise = _noise(row["speedup"], row["cpu_speedup"])
        if noise:
            lines.append(f"- {name}: the speedup is {noise}")
        if row["quotient"] > APART and not noise:
            full = uncached[row["model"]]["kinds"][0]
            parts = [part for kind in row["kinds"] if (part := _cheaper(kind, full))]
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
    share = kind["timing"]["median_us"] / full["timing"]["median_us"]
    flops = kind["floors"]["arithmetic"] * 1e3 / full["timing"]["median_us"]
    if share >= flops:
        return ""
    saved = f"{full['operators']} operators of an uncached step are {kind['operators']}"
    return (
        f"a {kind['kind']} step takes {share:.0%} of an uncached one and {flops:.0%} of its FLOPs, as {saved}"
    )


def notes(lines: Sequence[str]) -> list[str]:
    """The section."""
    text = f"Wall and CPU ratios that are {APART - 1:.0%} apart, and results as far beyond their ideal."
    return ["## Notes", "", text, "", *lines, ""] if lines else []
