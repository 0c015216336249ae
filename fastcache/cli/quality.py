"""`fastcache quality`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fastcache.cli.errors import naming
from fastcache.cli.tables import plain_table
from fastcache.files.whole import require_writable_folder

if TYPE_CHECKING:
    from rich.table import Table

    from fastcache.workshop.studies.quality import QualityReport


def quality(
    out: Annotated[Path, Option(help="Folder for the pictures (kept between runs) and report.json.")] = Path(
        "out/quality"
    ),
    per_class: Annotated[
        int, Option(min=2, max=10_000, help="Pictures of each of the 36 classes, for each setting.")
    ] = 28,
) -> None:
    """Judge many pictures of every setting of the demo by Frechet distance. Takes long; resumes."""
    with naming("--out"):
        require_writable_folder(out)

    from rich.console import Console

    from fastcache.workshop.studies.quality import run_quality

    report = run_quality(out, per_class=per_class)
    console = Console(highlight=False)
    if report.finished_before:
        console.print("finished before: the pictures of every setting were there")
    console.print(table_of(report))
    console.print(f"numbers: {out / 'report.json'}", soft_wrap=True)


def table_of(report: "QualityReport") -> "Table":
    """What `report` found, a line per setting, real pictures last."""
    where = report.environment
    table = plain_table(
        f"Glyphs-36, {report.pictures} pictures a setting",
        f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}",
        ("setting", "Frechet distance", "read", "PSNR dB", "s a picture"),
    )
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
