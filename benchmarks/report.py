"""What a run found: bench.json holds all of it, bench.md the tables."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.bandwidth import Bandwidth, ceiling
from benchmarks.cases import Form
from benchmarks.dispatch import DispatchRow
from benchmarks.flagship import Flagship
from benchmarks.forms import Absence, Row
from benchmarks.machine import Machine
from benchmarks.providers import Provider
from benchmarks.method_report import method_sections
from benchmarks.methods import MethodRow
from benchmarks.session import SessionRow, Way
from benchmarks.tables import (
    NOISY,
    bold_below_one,
    is_noisy,
    mark,
    microseconds,
    milliseconds,
    percent,
    table,
    times,
)
from benchmarks.timing import Timing
from benchmarks.token_operators import OperatorRow
from benchmarks.token_report import token_sections
from benchmarks.tokens import BlockRow, ChoiceRow

BUSY = 0.2  # share of noisy timings beyond which a run is not to be quoted


@dataclass(frozen=True)
class Report:
    """The whole of bench.json. Parts that were not asked for are None or empty. load_after: as `machine.load`, at the end."""

    machine: Machine
    quick: bool
    heap_kept: bool
    seconds: float
    load_after: float
    bandwidths: tuple[Bandwidth, ...]
    flagship: Flagship | None
    forms: tuple[Row, ...]
    absent: tuple[Absence, ...]
    dispatch: tuple[DispatchRow, ...]
    session: tuple[SessionRow, ...]
    blocks: tuple[BlockRow, ...] = ()
    choices: tuple[ChoiceRow, ...] = ()
    methods: tuple[MethodRow, ...] = ()
    operators: tuple[OperatorRow, ...] = ()

    @property
    def copy_gbps(self) -> float:
        """The ceiling of the forms."""
        return ceiling(list(self.bandwidths), self.machine.environment.threads)


def write_report(report: Report, out: Path) -> None:
    """bench.json and bench.md in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (out / "bench.md").write_text("\n".join(markdown(report)) + "\n")


def markdown(report: Report) -> list[str]:
    """All sections, in the order in which a reader asks."""
    lines = _head(report)
    for section in (
        _flagship,
        _summary,
        _losses,
        _forms,
        _operators,
        _dispatch,
        _session,
        _tokens,
        _methods,
        _absent,
    ):
        lines += section(report)
    return lines


def _head(report: Report) -> list[str]:
    machine, where = report.machine, report.machine.environment
    timings = _timings(report)
    noisy = sum(is_noisy(timing) for timing in timings)
    bandwidths = table(
        ("threads", "copy GB/s", "read GB/s", "buffer MB"),
        [
            (
                b.threads,
                f"{b.copy_gbps:.1f}{mark(b.copy)}",
                f"{b.read_gbps:.1f}{mark(b.read)}",
                f"{b.buffer_bytes / 1e6:.0f}",
            )
            for b in report.bandwidths
        ],
    )
    return [
        "# FastCache benchmarks",
        "",
        *(["**A quick run, on sizes that mean nothing.**", ""] if report.quick else []),
        *(
            [
                "**The machine was busy: too many timings of this run are noisy for its ratios to be quoted. Repeat it on a quiet one.**",
                "",
            ]
            if noisy > BUSY * len(timings)
            else []
        ),
        f"{where.processor}, {where.device}, {where.threads} threads, last-level cache {machine.last_level_cache_bytes / 2**20:.0f} MiB; "
        f"torch {where.torch} ({machine.torch_cpu_capability}), FastCache {where.fastcache}, backend {where.backend} ({machine.fastcache_cpu_capability}), Python {where.python}; {machine.date}.",
        f"{report.seconds:.0f} s; load {machine.load:.1f} at the start, {report.load_after:.1f} at the end; {noisy} of {len(timings)} timings are noisy (p90 beyond {NOISY} x p10), marked ~. "
        + (
            "Freed memory is kept by the process."
            if report.heap_kept
            else "Freed memory may go back to the system, and page faults are part of the times."
        ),
        "",
        "Times are medians. GB/s counts the least bytes that a form can move; its share is of the best copy bandwidth below on as many threads. `x naive` and the like: times faster than that contender.",
        "",
        *bandwidths,
    ]


def _flagship(report: Report) -> list[str]:
    if report.flagship is None:
        return []
    found = report.flagship
    bandwidth = f"One thread copies {found.bandwidth.copy_gbps:.1f} GB/s and reads {found.bandwidth.read_gbps:.1f} GB/s."
    return [
        f"## Flagship: {found.title}",
        "",
        *(f"- {verdict.text}" for verdict in found.verdicts),
        "",
        bandwidth,
        "",
        *row_table(found.rows),
    ]


def _summary(report: Report) -> list[str]:
    ours = [row for row in report.forms if row.provider == Provider.OURS.value]
    if not ours:
        return []
    headings = (
        "form",
        "size",
        "dtype",
        "cache",
        "MB",
        "median us",
        "GB/s",
        "of copy",
        "x naive",
        "x best eager",
        "x compile",
    )
    cells = [
        (
            row.form,
            row.size,
            row.dtype,
            row.cache,
            f"{row.bytes / 1e6:.1f}",
            microseconds(row.timing),
            f"{row.gbps:.1f}",
            percent(row.share_of_copy),
            *(bold_below_one(ratio) for ratio in ratios(row).values()),
        )
        for row in ours
    ]
    return [
        "## Operators: FastCache in every case",
        "",
        "Bold: FastCache is the slower one.",
        "",
        *table(headings, cells),
    ]


def _losses(report: Report) -> list[str]:
    ours = [row for row in report.forms if row.provider == Provider.OURS.value]
    lost = sorted(
        (ratio, other, row.case)
        for row in ours
        for other, ratio in ratios(row).items()
        if ratio is not None and ratio < 1
    )
    if not ours:
        return []
    lines = [f"- {case}: {other} is {1 / ratio:.2f}x faster" for ratio, other, case in lost]
    return [
        f"## Lost: {len(lost)} of {sum(ratio is not None for row in ours for ratio in ratios(row).values())} comparisons",
        "",
        *(lines or ["none"]),
        "",
    ]


def _forms(report: Report) -> list[str]:
    lines = []
    for form in Form:
        rows = [row for row in report.forms if row.form == form.value]
        if rows:
            lines += [f"## {form.value}: {form.meaning}", "", *row_table(rows)]
    return lines


def _dispatch(report: Report) -> list[str]:
    if not report.dispatch:
        return []
    modes = list(dict.fromkeys(row.mode for row in report.dispatch))
    found = {(row.call, row.mode): row.timing for row in report.dispatch}
    calls = list(dict.fromkeys(row.call for row in report.dispatch))
    cells = [
        (f"`{call}`", *(f"{found[call, mode].median_us:.2f}{mark(found[call, mode])}" for mode in modes))
        for call in calls
    ]
    return [
        "## Dispatch: microseconds of one gated update of 256 float32 numbers",
        "",
        *table(("call", *modes), cells),
    ]


def _session(report: Report) -> list[str]:
    if not report.session:
        return []
    uncached = {row.model: row for row in report.session if row.way == Way.UNCACHED.value}
    original = {row.model: row for row in report.session if row.way == Way.ORIGINAL.value}
    headings = (
        "model",
        "plan",
        "way",
        "full step ms",
        "ops",
        "reuse step ms",
        "ops",
        "begin ms",
        "generation ms",
        "x uncached",
        "reuse x original",
        "error",
    )
    cells = []
    for row in report.session:
        reuse = None if row.reuse is None else original[row.model].reuse.median_us / row.reuse.median_us
        cells.append((
            row.model, row.plan, row.way, milliseconds(row.full), row.ops_full, milliseconds(row.reuse), "-" if row.ops_reuse is None else row.ops_reuse, milliseconds(row.begin), milliseconds(row.generation),
            times(uncached[row.model].generation.median_us / row.generation.median_us), times(reuse), "-" if row.error is None else f"{row.error:.0e}",
        ))  # fmt: skip
    return ["## Session: steps of random float32 DiTs", "", *table(headings, cells)]


def _tokens(report: Report) -> list[str]:
    return token_sections(report.blocks, report.choices)


def _methods(report: Report) -> list[str]:
    return method_sections(report.methods)


def _absent(report: Report) -> list[str]:
    absent = (*report.absent, *(report.flagship.absent if report.flagship else ()))
    by_reason: dict[tuple[str, str], list[str]] = {}
    for one in absent:
        by_reason.setdefault((one.provider or "all contenders", one.reason), []).append(one.case)
    return (
        [
            "## Not measured",
            "",
            *(
                f"- {provider}: {reason}: {', '.join(found)}"
                for (provider, reason), found in by_reason.items()
            ),
            "",
        ]
        if absent
        else []
    )


def row_table(rows: Iterable[Row]) -> list[str]:
    """Every contender of some cases."""
    headings = (
        "size",
        "dtype",
        "contender",
        "MB",
        "cache",
        "median us",
        "p10",
        "p90",
        "best",
        "rounds",
        "GB/s",
        "of copy",
        "x naive",
        "x best eager",
        "x compile",
        "error",
    )
    cells = [
        (
            row.size,
            row.dtype,
            row.provider,
            f"{row.bytes / 1e6:.1f}",
            row.cache,
            microseconds(row.timing),
            f"{row.timing.p10_us:.0f}",
            f"{row.timing.p90_us:.0f}",
            f"{row.timing.best_us:.0f}",
            row.timing.rounds,
            f"{row.gbps:.1f}",
            percent(row.share_of_copy),
            *(times(ratio) for ratio in ratios(row).values()),
            f"{row.error:.0e}",
        )  # fmt: skip
        for row in rows
    ]
    return table(headings, cells)


def ratios(row: Row) -> dict[str, float | None]:
    """How many times faster than the others, in the order of the columns."""
    return {
        Provider.NAIVE.value: row.vs_naive,
        Provider.BEST_EAGER.value: row.vs_best_eager,
        Provider.COMPILED.value: row.vs_compile,
    }


def _operators(report: Report) -> list[str]:
    if not report.operators:
        return []
    headings = (
        "operator",
        "size",
        "dtype",
        "contender",
        "MB",
        "median us",
        "p10",
        "p90",
        "rounds",
        "GB/s",
        "x naive",
        "x best eager",
        "x compile",
    )
    cells = [
        (
            row.operator,
            row.size,
            row.dtype,
            row.provider,
            f"{row.bytes / 1e6:.1f}",
            microseconds(row.timing),
            f"{row.timing.p10_us:.0f}",
            f"{row.timing.p90_us:.0f}",
            row.timing.rounds,
            f"{row.gbps:.1f}",
            *(
                (bold_below_one if row.provider == Provider.OURS.value else times)(ratio)
                for ratio in (row.vs_naive, row.vs_best_eager, row.vs_compile)
            ),
        )  # fmt: skip
        for row in report.operators
    ]
    return ["## Operators on tokens: choices, scores and errors of calibration", "", *table(headings, cells)]


def _timings(report: Report) -> list[Timing]:
    rows = (
        *report.forms,
        *report.dispatch,
        *(report.flagship.rows if report.flagship else ()),
        *report.blocks,
        *report.choices,
        *report.operators,
    )
    steps = [
        timing
        for row in report.session
        for timing in (row.full, row.reuse, row.begin, row.generation)
        if timing is not None
    ]
    steps += [
        timing for row in report.methods for timing in (row.generation, *(kind.timing for kind in row.kinds))
    ]
    return [row.timing for row in rows] + steps
