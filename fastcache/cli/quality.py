"""`fastcache quality`."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from fastcache.workshop.studies.quality import QualityReport, run_quality


def quality(
    out: Annotated[Path, Option(help="Folder for the pictures (kept between runs) and report.json.")] = Path(
        "out/quality"
    ),
    per_class: Annotated[
        int, Option(min=2, help="Pictures of each of the 36 classes, for each setting.")
    ] = 28,
) -> None:
    """Judge many pictures of every setting of the demo by Frechet distance. Takes long; resumes."""
    report = run_quality(out, per_class=per_class)
    console = Console()
    console.print(table_of(report))
    console.print(f"numbers: {out / 'report.json'}")


def table_of(report: QualityReport) -> Table:
    """What `report` found, a line per setting, real pictures last."""
    where = report.environment
    table = Table(
        title=f"Glyphs-36, {report.pictures} pictures a setting",
        caption=f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}",
    )
    for heading in ("setting", "Frechet distance", "read", "PSNR dB", "s/picture"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in report.rows:
        table.add_row(
            row.setting,
            f"{row.frechet_distance:.3f}",
            f"{row.accuracy:.1%}",
            "-" if row.psnr_db is None else f"{row.psnr_db:.1f}",
            f"{row.seconds_per_picture:.3f}",
        )
    table.add_row("real pictures (floor)", f"{report.floor:.3f}", f"{report.real_accuracy:.1%}", "-", "-")
    return table
