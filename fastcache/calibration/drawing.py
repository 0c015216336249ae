"""Pictures of a calibration: error curves, the threshold, and the schedule that follows."""

from pathlib import Path
from typing import Any

from fastcache.calibration.scan import ErrorCurves
from fastcache.extras import needs_extra
from fastcache.files.whole import write_whole
from fastcache.plan.drawing import COLOURS
from fastcache.plan.published import PublishedSchedule


def draw_calibration(
    curves: ErrorCurves,
    threshold: float,
    published: PublishedSchedule,
    title: str,
    path: str | Path,
    *,
    per_layer: bool,
) -> None:
    """For each branch name: its errors E_1..E_K over steps, over a strip of what is computed. Needs
    matplotlib.
    """
    with needs_extra("demo"):
        import matplotlib
        from matplotlib.figure import Figure
    matplotlib.use("Agg", force=False)
    names = curves.layout.names
    figure = Figure(figsize=(10, 3.4 * len(names)), layout="constrained")
    axes = figure.subplots(
        2 * len(names), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [4, 1] * len(names)}
    )[:, 0]
    for index, name in enumerate(names):
        _curves(axes[2 * index], curves, threshold, per_layer, name)
        _strip(axes[2 * index + 1], published, name)
    axes[-1].set_xlabel("step (execution order)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    kind = Path(path).suffix[1:] or "png"
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format=kind))


def _curves(axis: Any, curves: ErrorCurves, threshold: float, per_layer: bool, name: str) -> None:
    keyed = curves.keyed(per_layer)
    for key, rows in keyed.items():
        if key == name or (per_layer and key.rpartition("-")[0] == name):
            for j, row in enumerate(rows):
                axis.plot(
                    range(j + 1, j + 1 + len(row)),
                    row,
                    color=f"C{j}",
                    linewidth=0.4 if per_layer else 1.2,
                    label=f"reused after {j + 1}",
                )
    axis.axhline(
        threshold,
        color="#444444",
        linestyle="--",
        linewidth=0.8,
        label=f"threshold {threshold:.3g}",
    )
    axis.set_ylabel("relative L1 error", fontsize=8)
    axis.set_title(name, fontsize=10, loc="left")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=7)


def _strip(axis: Any, published: PublishedSchedule, name: str) -> None:
    from matplotlib.colors import ListedColormap

    rows = [flags for key, flags in published.entries if key == name or key.rpartition("-")[0] == name]
    axis.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap((COLOURS["R"], COLOURS["C"])),
        vmin=0,
        vmax=1,
    )
    axis.set_yticks([])
    axis.set_ylabel(f"{sum(map(sum, rows))}/{sum(map(len, rows))}", fontsize=7)
