"""Pictures of a calibration: error curves, the threshold, and the schedule that follows."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcache.extras import needs_extra
from fastcache.plan.drawing import COLOURS

if TYPE_CHECKING:
    from fastcache.calibration.scan import Calibration


def draw_calibration(calibration: "Calibration", path: str | Path) -> None:
    """For each branch name: its errors E_1..E_K over steps, over a strip of what is computed. Needs
    matplotlib.
    """
    with needs_extra("demo"):
        import matplotlib
        from matplotlib.figure import Figure
    matplotlib.use("Agg", force=False)
    names = calibration.curves.layout.names
    figure = Figure(figsize=(10, 3.4 * len(names)), layout="constrained")
    axes = figure.subplots(
        2 * len(names), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [4, 1] * len(names)}
    )[:, 0]
    for index, name in enumerate(names):
        _curves(axes[2 * index], calibration, name)
        _strip(axes[2 * index + 1], calibration, name)
    axes[-1].set_xlabel("step (execution order)", fontsize=8)
    figure.suptitle(
        f"{calibration.curves.samples} run(s), ideal speedup {calibration.schedule().ideal_speedup():.2f}x",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _curves(axis: Any, calibration: "Calibration", name: str) -> None:
    keyed = calibration.curves.keyed(calibration.per_layer)
    for key, rows in keyed.items():
        if key == name or (calibration.per_layer and key.rpartition("-")[0] == name):
            for j, row in enumerate(rows):
                axis.plot(
                    range(j + 1, j + 1 + len(row)),
                    row,
                    color=f"C{j}",
                    linewidth=0.4 if calibration.per_layer else 1.2,
                    label=f"reused after {j + 1}",
                )
    axis.axhline(
        calibration.threshold,
        color="#444444",
        linestyle="--",
        linewidth=0.8,
        label=f"threshold {calibration.threshold:.3g}",
    )
    axis.set_ylabel("relative L1 error", fontsize=8)
    axis.set_title(name, fontsize=10, loc="left")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=7)


def _strip(axis: Any, calibration: "Calibration", name: str) -> None:
    from matplotlib.colors import ListedColormap

    rows = [
        flags for key, flags in calibration.published.entries if key == name or key.rpartition("-")[0] == name
    ]
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
