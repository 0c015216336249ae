"""The frontier as one picture: quality up, speedup across, the Pareto front through it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcache.extras import needs_extra
from fastcache.files.whole import write_whole
from fastcache.workshop.studies.frontier.front import FRECHET, METRICS, PSNR, SPEEDS, Metric
from fastcache.workshop.studies.frontier.grid import UNCACHED
from fastcache.workshop.studies.frontier.results import FrontierRow

MARKS = {
    "uncached": ("#222222", "*"),
    "FORA": ("#7f7f7f", "s"),
    "ToCa": ("#c9741a", "^"),
    "DuCa": ("#b13f3f", "v"),
    "TaylorSeer": ("#2f6fb5", "o"),
    "SmoothCache": ("#3a8f5a", "D"),
}


def draw_frontier(
    rows: Sequence[FrontierRow],
    fronts: Mapping[str, Mapping[str, Sequence[str]]],
    floor: float,
    path: Path,
) -> None:
    """A row of panels per metric, measured speedup to the left and ideal to the right. Needs matplotlib."""
    with needs_extra("demo"):
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    matplotlib.use("Agg", force=False)
    figure = Figure(figsize=(13, 4.4 * len(METRICS)), layout="constrained")
    axes = figure.subplots(len(METRICS), len(SPEEDS), squeeze=False, sharex=True, sharey="row")
    for line, metric in zip(axes, METRICS, strict=True):
        for axis, (speed, at) in zip(line, SPEEDS.items(), strict=True):
            shown = [row for row in rows if metric is not PSNR or row.method != UNCACHED.name]
            _points(axis, shown, [at(row) for row in shown], metric, fronts[speed][metric.name])
            axis.set_xlabel(f"{speed} speedup")
            axis.tick_params(labelbottom=True)
            if metric is FRECHET:
                axis.axhline(
                    floor,
                    color="#888888",
                    linestyle=":",
                    linewidth=1,
                    label=f"real pictures ({floor:.3f})",
                )
                axis.set_yscale("log")
                for of in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    of(FuncFormatter(lambda value, _: f"{value:g}"))
        if metric is FRECHET:
            line[0].invert_yaxis()  # and with it the axes that share it
        line[0].set_ylabel(f"{metric.label} (up is better)")
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize=9
    )
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def _points(
    axis: Any, rows: Sequence[FrontierRow], speeds: Sequence[float], metric: Metric, front: Sequence[str]
) -> None:
    """All points, those on the front larger, with their names, and joined by a staircase."""
    for method, (colour, mark) in MARKS.items():
        chosen = [index for index, row in enumerate(rows) if row.method == method]
        if chosen:
            sizes = [
                (70 if rows[index].setting in front else 26) * (2 if mark == "*" else 1) for index in chosen
            ]
            axis.scatter(
                [speeds[index] for index in chosen],
                [metric.value(rows[index]) for index in chosen],
                sizes,
                colour,
                marker=mark,
                label=method,
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
            )
    on_front = sorted(
        (speeds[index], metric.value(row), row.setting)
        for index, row in enumerate(rows)
        if row.setting in front
    )
    if on_front:
        across, up, _ = zip(*on_front, strict=True)
        axis.step(across, up, where="pre", color="#555555", linewidth=1, label="Pareto front", zorder=2)
    from matplotlib.patheffects import withStroke

    for number, (x, y, name) in enumerate(on_front):
        axis.annotate(
            name,
            (x, y),
            xytext=(4, 7 if number % 2 else -12),
            textcoords="offset points",
            fontsize=6.5,
            color="#222222",
            zorder=4,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
    axis.margins(x=0.1, y=0.1)
    axis.grid(alpha=0.25)
