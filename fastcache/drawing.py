"""Pictures of schedules."""
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastcache.schedule import Schedule

CODES = ("C", "R", "P", "F", "S")
LABELS = ("compute", "reuse", "refresh tokens", "forecast", "skip trunk")
COLOURS = ("#b13f3f", "#dfe7ee", "#e0a43b", "#4f86c6", "#2b2b2b")


def draw_schedules(schedules: Mapping[str, "Schedule"], path: str | Path) -> None:
    """One panel per schedule: steps across, branches down. Needs matplotlib (extra `demo`)."""
    try:
        import matplotlib
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing a schedule needs matplotlib: pip install 'fastcache-dit[demo]'") from error
    matplotlib.use("Agg", force=False)
    rows = [2 + 0.055 * len(schedule.layout.branches) for schedule in schedules.values()]
    figure = Figure(figsize=(10, sum(rows)), layout="constrained")
    axes = figure.subplots(len(schedules), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for axis, (name, schedule) in zip(axes, schedules.items(), strict=True):
        cells = [[CODES.index("S" if step.skip else action.kind.value) for step in schedule.steps for action in (step.actions[row],)] for row in range(len(schedule.layout.branches))]
        axis.imshow(cells, aspect="auto", interpolation="nearest", cmap=ListedColormap(COLOURS), vmin=0, vmax=len(CODES) - 1)
        kinds = ", ".join(f"{count} {kind}" for kind, count in schedule.kinds().items())
        axis.set_title(f"{name}: {kinds}; ideal speedup {schedule.ideal_speedup():.2f}x", fontsize=10, loc="left")
        stride = max(1, len(schedule.layout.branches) // 12)
        axis.set_yticks(range(0, len(schedule.layout.branches), stride), [f"{branch.name} {branch.block}" for branch in schedule.layout.branches][::stride], fontsize=6)
        axis.set_xlabel("step (execution order)", fontsize=8)
    used = sorted({code for schedule in schedules.values() for step in schedule.steps for code in ("S" if step.skip else action.kind.value for action in step.actions)}, key=CODES.index)
    figure.legend(handles=[Patch(facecolor=COLOURS[CODES.index(code)], edgecolor="#888888", label=LABELS[CODES.index(code)]) for code in used], loc="outside lower center", ncols=len(used), fontsize=8)
    figure.savefig(path, dpi=110)
