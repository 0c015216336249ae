"""Pictures of schedules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from fastcache.extras import needs_extra
from fastcache.files.whole import write_whole
from fastcache.plan.actions import Action
from fastcache.plan.layout import Layout
from fastcache.plan.step import StepPlan

LABELS = {"C": "compute", "R": "reuse", "F": "forecast", "S": "skip trunk"}
COLOURS = {"C": "#b13f3f", "R": "#dfe7ee", "F": "#4f86c6", "S": "#2b2b2b"}
# a refresh of no tokens, and of all
FEWEST, MOST = "#fbf0d3", "#a8640c"


class Drawable(Protocol):
    """What is drawn of a Schedule."""

    @property
    def layout(self) -> Layout: ...

    @property
    def steps(self) -> tuple[StepPlan, ...]: ...

    def kinds(self) -> dict[str, int]: ...

    def ideal_speedup(self) -> float: ...


def draw_schedules(schedules: Mapping[str, Drawable], path: str | Path) -> None:
    """One panel per schedule: steps across, branches down. Needs matplotlib (extra `demo`)."""
    with needs_extra("demo"):
        import matplotlib
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    matplotlib.use("Agg", force=False)
    rows = [2 + 0.055 * len(schedule.layout.branches) for schedule in schedules.values()]
    figure = Figure(figsize=(10, sum(rows)), layout="constrained")
    axes = figure.subplots(len(schedules), 1, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    for axis, (name, schedule) in zip(axes, schedules.items(), strict=True):
        cells = [
            [
                to_rgb(_colour(step, action, schedule.layout.tokens))
                for step in schedule.steps
                for action in (step.actions[row],)
            ]
            for row in range(len(schedule.layout.branches))
        ]
        axis.imshow(cells, aspect="auto", interpolation="nearest")
        kinds = ", ".join(f"{count} {kind}" for kind, count in schedule.kinds().items())
        axis.set_title(
            f"{name}: {kinds}; ideal speedup {schedule.ideal_speedup():.2f}x", fontsize=10, loc="left"
        )
        stride = max(1, len(schedule.layout.branches) // 12)
        axis.set_yticks(
            range(0, len(schedule.layout.branches), stride),
            [f"{branch.name} {branch.block}" for branch in schedule.layout.branches][::stride],
            fontsize=6,
        )
        axis.set_xlabel("step (execution order)", fontsize=8)
    entries = dict.fromkeys(entry for schedule in schedules.values() for entry in _legend(schedule))
    figure.legend(
        handles=[Patch(facecolor=colour, edgecolor="#888888", label=label) for label, colour in entries],
        loc="outside lower center",
        ncols=len(entries),
        fontsize=8,
    )
    kind = Path(path).suffix[1:] or "png"
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format=kind))


def _code(step: StepPlan, action: Action) -> str:
    """The letter of a cell: a skipped step's branches are skipped, but for those that compute."""
    return "S" if step.skip and action.kind.value != "C" else action.kind.value


def _colour(step: StepPlan, action: Action, tokens: int) -> str:
    code = _code(step, action)
    return COLOURS[code] if code in COLOURS else _shade(action.fresh_tokens / max(1, tokens))


def _shade(share: float) -> str:
    """The colour of refreshing this share of the tokens. Rises as the square root: small shares are told
    apart.
    """
    mixed = [
        round(int(few, 16) + (int(many, 16) - int(few, 16)) * min(share, 1.0) ** 0.5)
        for few, many in ((FEWEST[i : i + 2], MOST[i : i + 2]) for i in (1, 3, 5))
    ]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _legend(schedule: Drawable) -> list[tuple[str, str]]:
    """(label, colour) of what the schedule has; of its refreshes the smallest and the largest."""
    codes = {_code(step, action) for step in schedule.steps for action in step.actions}
    entries = [(label, COLOURS[code]) for code, label in LABELS.items() if code in codes]
    counts = [
        action.tokens for step in schedule.steps for action in step.actions if action.tokens is not None
    ]
    extremes = sorted({min(counts), max(counts)}) if counts else []
    return entries + [
        (
            f"refresh {count} of {schedule.layout.tokens} tokens",
            _shade(count / max(1, schedule.layout.tokens)),
        )
        for count in extremes
    ]
