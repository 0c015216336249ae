"""`fastcache demo`."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from fastcache.workshop.studies.demo import DemoReport, run_demo

NOISE = 0.1  # share by which the speedup of medians may differ from that of the fastest batches


def demo(
    out: Annotated[Path, Option(help="Folder for grid.png, steps.png, tokens.png and report.json.")] = Path(
        "out/demo"
    ),
    rounds: Annotated[
        int, Option(min=1, help="Times that every picture is sampled under every setting.")
    ] = 2,
) -> None:
    """Sample one picture of each glyph uncached and under FORA, ToCa, DuCa and TaylorSeer."""
    report = run_demo(out, rounds=rounds)
    console = Console()
    console.print(table_of(report))
    if any(abs(row.speedup / row.speedup_of_fastest - 1) > NOISE for row in report.rows):
        console.print(
            "The machine was busy: medians and fastest batches disagree. Run again when it is idle.",
            style="bold red",
        )
    console.print(
        f"pictures: {out / 'grid.png'}   plans: {out / 'steps.png'}   tokens: {out / 'tokens.png'}   numbers:"
        f" {out / 'report.json'}"
    )


def table_of(report: DemoReport) -> Table:
    """What `report` found, a line per setting."""
    where = report.environment
    table = Table(
        title=(
            f"Glyphs-36, {report.sampler.steps} steps of {report.sampler.scheduler}, guidance"
            f" {report.sampler.guidance}"
        ),
        caption=(
            f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}; "
            f"medians of {len(report.rows[0].batch_seconds)} batches of {report.sampler.batch_size}"
        ),
    )
    for heading in (
        "setting",
        "s/picture",
        "speedup",
        "of fastest",
        "ideal",
        "quotient",
        "PSNR dB",
        "read",
        "operators a step",
        "features MB",
    ):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in report.rows:
        table.add_row(
            row.setting,
            f"{row.seconds_per_picture:.3f}",
            f"{row.speedup:.2f}x",
            f"{row.speedup_of_fastest:.2f}x",
            f"{row.ideal_speedup:.2f}x",
            f"{row.quotient:.2f}",
            "-" if row.psnr_db is None else f"{row.psnr_db:.1f}",
            f"{row.accuracy:.0%}",
            ", ".join(f"{kind} {found.ops}" for kind, found in row.steps.items()),
            f"{row.feature_bytes / 1e6:.1f}",
        )
    return table
