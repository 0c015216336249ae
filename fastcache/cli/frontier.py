"""`fastcache frontier`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import BadParameter, Option

from fastcache.workshop.studies.frontier.plan import TINY, FrontierOptions, FrontierPlan, plan_frontier
from fastcache.workshop.studies.frontier.report import COLUMNS, FrontierReport, cells_of, order_lines
from fastcache.workshop.studies.frontier.run import run_frontier


def frontier(
    out: Annotated[
        Path, Option(help="Folder for frontier.json, .csv, .md, .png and a result per setting.")
    ] = Path("out/frontier"),
    only: Annotated[
        list[str] | None,
        Option(
            help=(
                "Measure only settings of this name, method or pattern, such as 'taylorseer*'; may be"
                " repeated."
            )
        ),
    ] = None,
    pictures: Annotated[
        int | None, Option(min=2, help="Pictures of each setting; 1008 unless --tiny.")
    ] = None,
    steps: Annotated[int | None, Option(min=2, help="Steps of the scheduler; 50 unless --tiny.")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Pictures of a batch; 12 unless --tiny.")] = None,
    tiny: Annotated[
        bool, Option("--tiny", help="Two settings, few pictures and steps: does it run?")
    ] = False,
) -> None:
    """Quality against speed of every policy over a grid of settings. Takes over an hour; resumes."""
    options = TINY if tiny else FrontierOptions()
    sampler = replace(
        options.sampler,
        steps=steps or options.sampler.steps,
        batch_size=batch_size or options.sampler.batch_size,
    )
    options = replace(options, sampler=sampler, pictures=pictures or options.pictures)
    console = Console()
    try:
        plan = plan_frontier(out, options, only=only or ())
    except ValueError as error:
        raise BadParameter(f"--{error}") from error
    console.print(plan_table(plan))
    report = run_frontier(plan, out)
    console.print(table_of(report))
    console.print(
        "Order of methods at equal interval:",
        *order_lines(report.order),
        sep="\n  ",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"table: {out / 'frontier.md'}   plot: {out / 'frontier.png'}   numbers: {out / 'frontier.json'},"
        f" {out / 'frontier.csv'}",
        highlight=False,
    )


def plan_table(plan: FrontierPlan) -> Table:
    """What is going to be measured, and how long that will take."""
    table = Table(
        title=(
            f"{plan.options.pictures} pictures a setting, {plan.options.sampler.steps} steps, batches of"
            f" {plan.options.sampler.batch_size}"
        ),
        caption=(
            f"{plan.uncached_seconds_per_picture:.2f} s a picture uncached in a short trial; about"
            f" {plan.seconds / 60:.0f} minutes left if the machine stays as busy as it is"
        ),
    )
    for heading in ("setting", "ideal", "steps", "state", "minutes"):
        table.add_column(heading, justify="left" if heading in ("setting", "steps") else "right")
    for planned in plan.measured:
        kinds = (
            "all full"
            if planned.schedule is None
            else ", ".join(f"{count} {kind}" for kind, count in planned.schedule.kinds().items())
        )
        table.add_row(
            planned.setting.name,
            f"{planned.ideal_speedup:.2f}x",
            kinds,
            planned.state,
            f"{planned.seconds / 60:.1f}",
        )
    return table


def table_of(report: FrontierReport) -> Table:
    """What `report` found, a line per setting."""
    where = report.environment
    table = Table(
        title=(
            f"Glyphs-36, {report.pictures} pictures a setting, {report.sampler.steps} steps of"
            f" {report.sampler.scheduler}, guidance {report.sampler.guidance}"
        ),
        caption=(
            f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}; real"
            f" pictures: Frechet distance {report.floor:.3f}"
        ),
    )
    shown = [column for column in COLUMNS if column not in ("steps", "features")]
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in report.rows:
        cells = dict(zip(COLUMNS, cells_of(row), strict=True))
        table.add_row(*[cells[column] for column in shown])
    return table
