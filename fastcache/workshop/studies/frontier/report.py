"""The report of a frontier: frontier.json, frontier.csv, frontier.md and frontier.png."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastcache.files.whole import write_text_whole
from fastcache.workshop.environment import Environment, environment
from fastcache.workshop.studies.comparison import Sampler
from fastcache.workshop.studies.frontier.drawing import draw_frontier
from fastcache.workshop.studies.frontier.front import (
    EXPECTED,
    FRECHET,
    METRICS,
    SPEEDS,
    OrderCheck,
    fronts,
    order_checks,
)
from fastcache.workshop.studies.frontier.judging import Judge
from fastcache.workshop.studies.frontier.results import FrontierRow

NO_ROUTER = (
    "No L2C router was trained for this model: the setting `SmoothCache 2x per layer` stands for schedules of"
    " single layers."
)
INTERVALS = (
    "Equal interval is not equal work: on DiT, ToCa and DuCa start with a longer interval than the one that"
    " is set (5 for 3) and end with a shorter one (2), and compute more steps in full than FORA and"
    " TaylorSeer; compare the ideal speedups that are given with each. Glyph DiT's features change fastest in"
    " the first steps (results/calibration-curves.json), where the longer interval reuses them longest, and"
    " where the authors' ratio refreshes no token yet: that is the likely reason where ToCa or DuCa are"
    " behind FORA. Speedups are of three pairs of batches: on a busy machine they are rough."
)
COLUMNS = (
    "setting",
    "s a picture",
    "speedup",
    "ideal",
    "quotient",
    "Frechet",
    "PSNR",
    "read",
    "steps",
    "features",
)


@dataclass(frozen=True)
class FrontierReport:
    """All points and what they say. `floor`: Frechet distance between two sets of real pictures."""

    environment: Environment
    sampler: Sampler
    pictures: int
    floor: float
    rows: list[FrontierRow]
    missing: list[str]  # settings of the grid that are not measured yet
    fronts: dict[str, dict[str, list[str]]]  # settings on the Pareto front, by kind of speedup and metric
    order: list[OrderCheck]


def report_of(
    sampler: Sampler,
    pictures: int,
    rows: Sequence[FrontierRow],
    missing: Sequence[str],
    judge: Judge,
    features: Mapping[str, np.ndarray],
) -> FrontierReport:
    """The report of the rows that are there; features [n, 64] by setting, where they are known."""
    return FrontierReport(
        environment(),
        sampler,
        pictures,
        judge.floor,
        list(rows),
        list(missing),
        fronts(rows),
        order_checks(rows, features, judge.real),
    )


def write_report(report: FrontierReport, out: Path) -> None:
    """All four files, each replaced as a whole. Needs matplotlib (extra `demo`)."""
    write_text_whole(out / "frontier.json", json.dumps(asdict(report), indent=2) + "\n")
    write_text_whole(out / "frontier.csv", _csv(report.rows))
    write_text_whole(out / "frontier.md", markdown(report))
    draw_frontier(report.rows, report.fronts, report.floor, out / "frontier.png")


def markdown(report: FrontierReport) -> str:
    """Table, order and fronts, to be read."""
    where = report.environment
    lines = [
        "# Quality against speed",
        "",
        (
            f"Glyph DiT, {report.pictures} pictures a setting, {report.sampler.steps} steps of"
            f" {report.sampler.scheduler}, guidance {report.sampler.guidance}, the same seeds and labels for"
            f" all. {where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}."
        ),
        "",
        (
            "Speedup: the median time of uncached batches over that of the setting's, which took turns with"
            " them. Ideal: uncached FLOPs / planned FLOPs. Quotient: measured / ideal. Frechet distance is"
            f" to real pictures (two sets of real pictures: {report.floor:.3f}), PSNR is against the uncached"
            " pictures."
        ),
        "",
        NO_ROUTER,
        "",
        *_table(report),
        "",
        "## Order of methods at equal interval",
        "",
        f"Expected from the papers: {' better than '.join(EXPECTED)}.",
        "",
        *[f"- {line}" for line in order_lines(report.order)],
        "",
        INTERVALS,
        "",
        "## Pareto fronts",
        "",
        *[
            f"- {metric.label} against {speed} speedup: {', '.join(report.fronts[speed][metric.name])}"
            for speed in SPEEDS
            for metric in METRICS
        ],
        "",
    ]
    if report.missing:
        lines += [f"Not measured yet: {', '.join(report.missing)}.", ""]
    return "\n".join(lines)


def order_lines(checks: Sequence[OrderCheck]) -> list[str]:
    """One line per check: the ranking that was found, and where it is not the expected one."""
    return [_order_line(check) for check in checks] or ["no interval at which two methods were measured"]


def _order_line(check: OrderCheck) -> str:
    metric = next(metric for metric in METRICS if metric.name == check.metric)
    ranking = ", ".join(
        f"{place.setting}: {metric.text.format(place.value)} (ideal {place.ideal_speedup:.2f}x)"
        for place in check.ranking
    )
    line = f"interval {check.interval}, {metric.label}, best first: {ranking}; "
    if check.holds:
        return line + "as expected"
    pairs = [
        f"{worse} better than {better}" + (" (within noise)" if (better, worse) in check.within_noise else "")
        for better, worse in check.broken
    ]
    return line + f"not as expected: {', '.join(pairs)}"


def _table(report: FrontierReport) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return lines + ["| " + " | ".join(cells_of(row)) + " |" for row in report.rows]


def cells_of(row: FrontierRow) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    return (
        row.setting,
        f"{row.seconds_per_picture:.3f}",
        f"{row.speedup:.2f}x",
        f"{row.ideal_speedup:.2f}x",
        f"{row.quotient:.2f}",
        FRECHET.text.format(row.frechet_distance),
        "-" if row.psnr_db is None else f"{row.psnr_db:.1f} dB",
        f"{row.accuracy:.1%}",
        ", ".join(f"{count} {kind}" for kind, count in row.step_kinds.items()) or "all full",
        f"{row.feature_bytes / 1e6:.1f} MB",
    )


def _csv(rows: Sequence[FrontierRow]) -> str:
    text = io.StringIO()
    left_out = ("batch_seconds", "uncached_batch_seconds")
    writer = None
    for row in rows:
        record = {
            name: json.dumps(value) if isinstance(value, dict) else value
            for name, value in asdict(row).items()
            if name not in left_out
        }
        if writer is None:
            writer = csv.DictWriter(text, list(record), lineterminator="\n")
            writer.writeheader()
        writer.writerow(record)
    return text.getvalue()
