"""`fastcache frontier`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from fastcache.cli.errors import naming
from fastcache.cli.model_options import LAST_STEP, MOST_PICTURES
from fastcache.cli.tables import plain_table
from fastcache.files.whole import require_writable_folder

if TYPE_CHECKING:
    from rich.table import Table

    from fastcache.workshop.studies.frontier.plan import FrontierPlan
    from fastcache.workshop.studies.frontier.report import FrontierReport


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
        int | None, Option(min=2, max=MOST_PICTURES, help="Pictures of each setting; 1008 unless --tiny.")
    ] = None,
    steps: Annotated[
        int | None, Option(min=2, max=LAST_STEP, help="Steps of the scheduler; 50 unless --tiny.")
    ] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Pictures of a batch; 12 unless --tiny.")] = None,
    tiny: Annotated[
        bool, Option("--tiny", help="Two settings, few pictures and steps: does it run?")
    ] = False,
) -> None:
    """Quality against speed of every policy over a grid of settings. Takes over an hour; resumes."""
    with naming("--out"):
        require_writable_folder(out)

    from rich.console import Console
    from rich.padding import Padding

    from fastcache.workshop.studies.frontier.plan import TINY, FrontierOptions, plan_frontier
    from fastcache.workshop.studies.frontier.report import order_lines
    from fastcache.workshop.studies.frontier.run import run_frontier

    options = TINY if tiny else FrontierOptions()
    sampler = replace(
        options.sampler,
        steps=steps or options.sampler.steps,
        batch_size=batch_size or options.sampler.batch_size,
    )
    options = replace(options, sampler=sampler, pictures=pictures or options.pictures)
    console = Console(highlight=False)
    try:
        plan = plan_frontier(out, options, only=only or ())
    except ValueError as error:
        raise BadParameter(f"--{error}") from error
    console.print(plan_table(plan))
    if not plan.left:
        console.print("finished before: every setting was there")
    report = run_frontier(plan, out)
    console.print(table_of(report))
    console.print("Order of methods at equal interval:")
    for line in order_lines(report.order):
        console.print(Padding(line, (0, 0, 0, 2)))
    for what, name in (
        ("table", "frontier.md"),
        ("plot", "frontier.png"),
        ("numbers", "frontier.json"),
        ("numbers", "frontier.csv"),
    ):
        console.print(f"{what}: {out / name}", soft_wrap=True)


def plan_table(plan: "FrontierPlan") -> "Table":
    """What is going to be measured, and how long that will take."""
    left = (
        f"about {plan.seconds / 60:.0f} minutes left if the machine stays as busy as it is"
        if plan.left
        else "nothing is left to measure"
    )
    table = plain_table(
        f"{plan.options.pictures} pictures a setting, {plan.options.sampler.steps} steps, batches of"
        f" {plan.options.sampler.batch_size}",
        f"{plan.uncached_seconds_per_picture:.2f} s a picture uncached in a short trial; {left}",
        ("setting", "ideal", "steps", "state", "minutes"),
        text=("steps",),
    )
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


def table_of(report: "FrontierReport") -> "Table":
    """What `report` found, a line per setting."""
    from fastcache.workshop.studies.frontier.report import COLUMNS, cells_of

    where = report.environment
    shown = [column for column in COLUMNS if column not in ("steps", "features")]
    table = plain_table(
        f"Glyphs-36, {report.pictures} pictures a setting, {report.sampler.steps} steps of"
        f" {report.sampler.scheduler}, guidance {report.sampler.guidance}",
        f"{where.processor}, {where.threads} threads, torch {where.torch}, backend {where.backend}; real"
        f" pictures: Frechet distance {report.floor:.3f}",
        shown,
    )
    for row in report.rows:
        cells = dict(zip(COLUMNS, cells_of(row), strict=True))
        table.add_row(cells["setting"], *[cells[column] for column in shown if column != "setting"])
    return table
