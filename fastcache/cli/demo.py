"""`fastcache demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fastcache.cli.errors import naming
from fastcache.cli.tables import plain_table
from fastcache.files.whole import require_writable_folder

if TYPE_CHECKING:
    from rich.table import Table

    from fastcache.workshop.studies.demo import DemoReport

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
    with naming("--out"):
        require_writable_folder(out)

    from rich.console import Console

    from fastcache.workshop.studies.demo import run_demo

    report = run_demo(out, rounds=rounds)
    console = Console(highlight=False)
    console.print(table_of(report))
    console.print(costs_of(report))
    if any(abs(row.speedup / row.speedup_of_fastest - 1) > NOISE for row in report.rows):
        console.print(
            "The machine was busy: medians and fastest batches disagree. Run again when it is idle.",
            style="bold red",
        )
    for what, name in (
        ("pictures", "grid.png"),
        ("plans", "steps.png"),
        ("tokens", "tokens.png"),
        ("numbers", "report.json"),
    ):
        console.print(f"{what}: {out / name}", soft_wrap=True)


def table_of(report: "DemoReport") -> "Table":
    """How fast and how good each setting is."""
    where = report.environment
    table = plain_table(
        f"Glyphs-36, {report.sampler.steps} steps of {report.sampler.scheduler}, guidance"
        f" {report.sampler.guidance}",
        f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}; "
        f"medians of {len(report.rows[0].batch_seconds)} batches of {report.sampler.batch_size}",
        (
            "setting",
            "s a picture",
            "speedup",
            "of fastest",
            "ideal",
            "quotient",
            "PSNR dB",
            "read",
        ),
    )
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
        )
    return table


def costs_of(report: "DemoReport") -> "Table":
    """What a step of each kind dispatches, and what is stored between steps."""
    table = plain_table(
        "What it takes",
        "",
        ("setting", "operators of a step", "features MB"),
        text=("operators of a step",),
    )
    for row in report.rows:
        table.add_row(
            row.setting,
            ", ".join(f"{kind} {found.ops}" for kind, found in row.steps.items()),
            f"{row.feature_bytes / 1e6:.1f}",
        )
    return table
