"""Which tokens a policy refreshed at which step, drawn over the pictures (`tokens.png` of the demo)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.engine.session import accelerate
from fastcache.extras import needs_extra
from fastcache.files.whole import write_whole
from fastcache.models import DiT
from fastcache.plan.actions import Kind
from fastcache.plan.drawing import COLOURS
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan
from fastcache.policies import Policy
from fastcache.workshop.glyphs.dataset import to_pixels
from fastcache.workshop.studies.comparison import Sampler

SHOWN_STEPS = 9
STRIP = 5  # tokens' height of the strip under the chart that shows the kind of every step
DIMMED = 0.35  # of a picture's brightness, where no layer refreshed
OVERLAY = "#ffb030"
OPACITY = 0.95  # of the overlay where every layer refreshed
BAR_COLOURS = {
    "full": COLOURS["C"],
    "partial": "#d98a1f",
    "skip": COLOURS["S"],
    "mixed": "#8d5a2b",
    "reuse": COLOURS["R"],
    "forecast": COLOURS["F"],
}


@dataclass(frozen=True)
class TokenRecord:
    """One run with its tokens recorded. shares: by step [n, N] in 0..1, the share of layers that refreshed a
    token.
    """

    pictures: np.ndarray  # [n, S, S, 3] uint8
    schedule: Schedule
    shares: dict[int, np.ndarray]

    def shown_steps(self, count: int = SHOWN_STEPS) -> list[int]:
        """Up to `count` of the steps that refreshed tokens, first and last among them, spread evenly."""
        steps = sorted(self.shares)
        if len(steps) <= count:
            return steps
        return [steps[round(number * (len(steps) - 1) / (count - 1))] for number in range(count)]


def record_tokens(model: DiT, policy: Policy, sampler: Sampler, indices: Sequence[int]) -> TokenRecord:
    """Pictures `indices` of the glyph model under a policy that refreshes tokens, in one batch."""
    with accelerate(
        model, policy, num_steps=sampler.steps, calls_per_step=1, count_ops=False, record_tokens=True
    ) as session:
        samples = sampler.run(model, indices, None)
        tokens = dict(session.tokens)
    schedule = session.schedule
    return TokenRecord(
        to_pixels(samples.pictures),
        schedule,
        {step: _share(found, schedule, len(indices)) for step, found in tokens.items() if found},
    )


def _share(chosen: Mapping[int, Tensor], schedule: Schedule, pictures: int) -> np.ndarray:
    """The share of all refreshed branches, those without a choice counted in, that chose a token: [n, N]."""
    # the first half of a batch with guidance is the pictures with their labels
    total = torch.stack([mask[:pictures].float() for mask in chosen.values()]).sum(0)
    return (total / len(schedule.refreshed)).numpy()


def draw_tokens(records: Mapping[str, TokenRecord], path: Path) -> None:
    """For each record rows of pictures, a step a column, over a chart of how many tokens each step computed.

    Needs matplotlib (extra `demo`). Records without a refreshed token have the chart alone.
    """
    with needs_extra("demo"):
        import matplotlib
        from matplotlib.figure import Figure
    matplotlib.use("Agg", force=False)
    heights = [1.25 * len(record.pictures) + 2.3 for record in records.values()]
    figure = Figure(figsize=(13, sum(heights) + 0.9), layout="constrained")
    figure.suptitle("Which tokens the partial steps refreshed", fontsize=12)
    bands = figure.subfigures(len(records), 1, squeeze=False, height_ratios=heights)[:, 0]
    for band, (name, record) in zip(bands, records.items(), strict=True):
        count = len(record.pictures)
        above, below = band.subfigures(2, 1, height_ratios=(1.25 * count + 0.5, 1.8))
        kinds = ", ".join(f"{number} {kind}" for kind, number in record.schedule.kinds().items())
        above.suptitle(
            f"{name}: {kinds}; ideal speedup {record.schedule.ideal_speedup():.2f}x",
            fontsize=10,
            x=0.01,
            ha="left",
            weight="bold",
        )
        _pictures(above, record)
        _scale(above)
        _chart(below, record)
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))


def _pictures(figure: Any, record: TokenRecord) -> None:
    steps = record.shown_steps()
    axes = figure.subplots(len(record.pictures), 1 + SHOWN_STEPS, squeeze=False)
    for row, picture in zip(range(len(record.pictures)), record.pictures, strict=True):
        for axis in axes[row]:
            axis.set_axis_off()
        axes[row][0].imshow(picture)
        for axis, step in zip(axes[row][1:], steps, strict=False):
            shares = record.shares[step][row]
            axis.imshow(overlaid(picture, shares))
    axes[0][0].set_title("picture", fontsize=8)
    for axis, step in zip(axes[0][1:], steps, strict=False):
        axis.set_title(f"step {step}: {_refreshed(record, step)}", fontsize=8)


def _scale(figure: Any) -> None:
    """What the overlay's strength means, beside the pictures."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    shades = [
        overlaid(np.full((1, 1, 3), 90, np.uint8), np.array([share]))[0, 0] / 255
        for share in np.linspace(0, 1, 64)
    ]
    bar = figure.colorbar(
        ScalarMappable(cmap=ListedColormap(shades)),
        ax=figure.axes,
        fraction=0.012,
        pad=0.006,
        ticks=(0, 0.5, 1),
    )
    bar.ax.set_yticklabels(("0 %", "50 %", "100 %"), fontsize=7)
    bar.set_label("layers that refreshed the token", fontsize=7)


def overlaid(picture: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A grey, dimmed picture [S, S, 3] uint8 on which token t is tinted by shares[t] in 0..1; tokens row by
    row.
    """
    side, grid = picture.shape[0], isqrt(len(shares))
    grey = picture.mean(axis=2, keepdims=True) / 255
    tint = np.array([int(OVERLAY[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    strength = OPACITY * shares.reshape(grid, grid).repeat(side // grid, 0).repeat(side // grid, 1)[..., None]
    # the picture brightens under the overlay, so that a letter stays visible in refreshed cells
    mixed = (1 - strength) * DIMMED * grey + strength * tint * (0.8 + 0.2 * grey)
    return np.rint(mixed.clip(0, 1) * 255).astype(np.uint8)


def _chart(figure: Any, record: TokenRecord) -> None:
    """Tokens computed by step: a bar of the mean over branches that refresh, a line from the fewest to the
    most.
    """
    from matplotlib.patches import Patch

    axis = figure.subplots(1, 1)
    shown, kinds = set(record.shown_steps()), []
    for step, plan in enumerate(record.schedule.steps):
        counts = tokens_computed(plan, record.schedule)
        axis.bar(step, sum(counts) / len(counts), color=BAR_COLOURS[plan.kind], width=0.8)
        axis.bar(step, -STRIP * 0.8, color=BAR_COLOURS[plan.kind], width=0.8, bottom=-STRIP * 0.2)
        if min(counts) < max(counts):
            axis.plot([step, step], [min(counts), max(counts)], color="#222222", linewidth=1)
        if plan.kind not in kinds:
            kinds.append(plan.kind)
    axis.set_xticks(sorted(shown), [str(step) for step in sorted(shown)], fontsize=7)
    axis.set_xlim(-0.7, record.schedule.num_steps - 0.3)
    axis.set_ylim(-STRIP, record.schedule.layout.tokens * 1.03)
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.set_ylabel("tokens computed\nby a layer", fontsize=8)
    axis.set_xlabel(
        "step in execution order; numbered: shown above. Lines: fewest to most of the layers. Strip: kind of"
        " step",
        fontsize=8,
    )
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(
        handles=[Patch(color=BAR_COLOURS[kind], label=kind) for kind in kinds],
        fontsize=7,
        ncols=len(kinds),
        loc="upper left",
        bbox_to_anchor=(0, 1.2),
        frameon=False,
    )


def tokens_computed(plan: StepPlan, schedule: Schedule) -> list[int]:
    """How many tokens of a sample each branch that the schedule ever refreshes computes at a step."""
    if plan.skip:
        return [0] * max(1, len(schedule.refreshed))
    N = schedule.layout.tokens
    actions = [plan.actions[index] for index in sorted(schedule.refreshed)] or list(plan.actions)
    return [N if action.kind is Kind.COMPUTE else min(action.tokens or 0, N) for action in actions]


def _refreshed(record: TokenRecord, step: int) -> str:
    counts = tokens_computed(record.schedule.steps[step], record.schedule)
    return f"K {min(counts)}" if min(counts) == max(counts) else f"K {min(counts)}-{max(counts)}"
