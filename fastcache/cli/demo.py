"""`fastcache demo`."""
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from fastcache.demo import DemoReport, run_demo


def demo(
    out: Annotated[Path, Option(help="Folder for grid.png, steps.png and report.json.")] = Path("out/demo"),
    rounds: Annotated[int, Option(min=1, help="Times that every picture is sampled under every setting.")] = 2,
) -> None:
    """Sample one picture of each glyph uncached and under FORA at intervals 2, 3 and 5."""
    report = run_demo(out, rounds=rounds)
    console = Console()
    console.print(table_of(report))
    console.print(f"pictures: {out / 'grid.png'}   plans: {out / 'steps.png'}   numbers: {out / 'report.json'}")


def table_of(report: DemoReport) -> Table:
    """What `report` found, a line per setting."""
    where = report.environment
    table = Table(
        title=f"Glyphs-36, {report.sampler.steps} steps of {report.sampler.scheduler}, guidance {report.sampler.guidance}",
        caption=f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}; "
        f"medians (quartiles) of {len(report.rows[0].batch_seconds)} batches of {report.sampler.batch_size}",
    )
    for heading in ("setting", "s/picture", "speedup", "ideal", "quotient", "PSNR dB", "read", "operators a step", "features MB"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in report.rows:
        table.add_row(
            row.setting,
            f"{row.seconds_per_picture:.3f}",
            "{:.2f}x ({:.2f}-{:.2f})".format(row.speedup, *row.speedup_quartiles),
            f"{row.ideal_speedup:.2f}x",
            f"{row.quotient:.2f}",
            "-" if row.psnr_db is None else f"{row.psnr_db:.1f}",
            f"{row.accuracy:.0%}",
            ", ".join(f"{kind} {found.ops}" for kind, found in row.steps.items()),
            f"{row.feature_bytes / 1e6:.1f}",
        )
    return table
