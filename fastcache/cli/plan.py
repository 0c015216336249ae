"""`fastcache plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from fastcache.cli.errors import naming
from fastcache.cli.policy_options import PolicyFields, PolicyName, plan_of, policy_from
from fastcache.cli.tables import plain_table
from fastcache.files.whole import require_writable

if TYPE_CHECKING:
    from rich.table import Table

    from fastcache.plan.layout import Layout
    from fastcache.plan.schedule import Schedule
    from fastcache.plan.step import StepPlan
    from fastcache.policies import Policy

GUIDED = 2
MOST_STEPS = 100_000
MOST_DRAWN = 2_000  # steps of a picture in which one can be told from the next
MOST_SPANS = 60  # of equal steps that are listed
MOST_LINES = 200  # of a table


def plan(
    policy: PolicyName = "fora",
    fields: PolicyFields = None,
    steps: Annotated[int, Option(min=1, max=MOST_STEPS, help="Model evaluations of a generation.")] = 50,
    model: Annotated[str, Option(help="A published size such as DiT-XL/2, or glyphs.")] = "DiT-XL/2",
    input_size: Annotated[
        int, Option(min=1, max=4096, help="Side of the latent: 32 for 256 px, 64 for 512 px.")
    ] = 32,
    draw: Annotated[Path | None, Option(help="Also draw the plan to this PNG.")] = None,
    save: Annotated[Path | None, Option(help="Also write the plan to this JSON file.")] = None,
) -> None:
    """Show what a policy does at every step of a model, and what that costs, without running it."""
    for option, path in (("--draw", draw), ("--save", save)):
        if path is not None:
            with naming(option):
                require_writable(path)
    if draw is not None and steps > MOST_DRAWN:
        raise BadParameter(f"--draw: a picture shows at most {MOST_DRAWN} steps, got --steps {steps}")
    chosen = policy_from(policy, fields)
    if chosen is None:
        raise BadParameter("--policy: expected one, got none; see fastcache policies")
    layout = layout_of(model, input_size)
    schedule = plan_of(chosen, steps, layout)

    from rich.console import Console

    console = Console(highlight=False)
    console.print(table_of(schedule, model))
    if schedule.refreshed:
        console.print(tokens_of(schedule))
    authors = _authors_flops(chosen, steps, layout)
    if authors is not None:
        console.print(
            f"{authors:,} FLOPs by the authors' own formula, which counts the blocks alone, for a batch of"
            f" {GUIDED} (one sample with guidance)"
        )
    if draw is not None:
        from fastcache.plan.drawing import draw_schedules

        draw_schedules({f"{schedule.policy} on {model}": schedule}, draw)
        console.print(f"drawn: {draw}", soft_wrap=True)
    if save is not None:
        schedule.save(save)
        console.print(f"saved: {save}", soft_wrap=True)


def layout_of(model: str, input_size: int) -> "Layout":
    """The branches of a reference model, without allocating its weights. Raises BadParameter."""
    import torch

    from fastcache.hosts import recognise
    from fastcache.models import PRESETS, DiT
    from fastcache.workshop.glyphs.train import CONFIG as GLYPHS

    if model != "glyphs" and model not in PRESETS:
        raise BadParameter(f"--model: expected glyphs or one of {', '.join(PRESETS)}, got {model!r}")
    try:
        with torch.device("meta"):
            built = DiT.from_config(GLYPHS) if model == "glyphs" else DiT.preset(model, input_size)
    except ValueError as error:
        raise BadParameter(f"--{str(error).replace('_', '-', 1)}, for {model}") from error
    return recognise(built).layout()


def table_of(schedule: "Schedule", model: str) -> "Table":
    """A line per kind of step, and the sum."""
    settings = ", ".join(f"{name}={value}" for name, value in schedule.fields.items())
    table = plain_table(
        f"{schedule.policy}({settings}) on {model}, {schedule.num_steps} steps",
        f"ideal speedup {schedule.ideal_speedup():.2f}x (FLOPs of the whole model, one sample, without"
        " guidance)",
        ("kind", "steps", "GFLOPs a step", "GFLOPs", "at"),
        text=("at",),
    )
    steps_of: dict[str, list[int]] = {}
    for index, step in enumerate(schedule.steps):
        steps_of.setdefault(step.kind, []).append(index)
    for kind, at in steps_of.items():
        flops = sum(schedule.steps[index].flops() for index in at)
        table.add_row(kind, str(len(at)), f"{flops / len(at) / 1e9:.3f}", f"{flops / 1e9:.1f}", _ranges(at))
    table.add_section()
    table.add_row(
        "all",
        str(schedule.num_steps),
        f"{schedule.flops() / schedule.num_steps / 1e9:.3f}",
        f"{schedule.flops() / 1e9:.1f}",
        "",
    )
    return table


def tokens_of(schedule: "Schedule") -> "Table":
    """A line per run of equal steps that refresh tokens: how many in each branch, over all blocks."""
    names = [
        name
        for name in schedule.layout.names
        if any(schedule.layout.branches[index].name == name for index in schedule.refreshed)
    ]
    table = plain_table(
        f"refreshed of {schedule.layout.tokens} tokens",
        "fewest-most of any block",
        ("steps", "kind", *names),
        text=("kind",),
    )
    lines = {id(step): (step.kind, *(_tokens(step, name) for name in names)) for step in schedule.distinct}
    steps_of: dict[tuple[str, ...], list[int]] = {}
    for index, step in enumerate(schedule.steps):
        steps_of.setdefault(lines[id(step)], []).append(index)
    shown = [(line, at) for line, at in steps_of.items() if any(line[1:])]
    for line, at in shown[:MOST_LINES]:
        table.add_row(_ranges(at), *line)
    if len(shown) > MOST_LINES:
        table.add_row(f"and {len(shown) - MOST_LINES} more kinds", *[""] * (1 + len(names)))
    return table


def _tokens(step: "StepPlan", name: str) -> str:
    """ "21-32", "0" or, for a branch that refreshes none, nothing."""
    from fastcache.plan.actions import Kind

    found = [
        action.fresh_tokens
        for action, branch in zip(step.actions, step.layout.branches, strict=True)
        if branch.name == name and action.kind is Kind.REFRESH
    ]
    if not found:
        return ""
    return str(found[0]) if min(found) == max(found) else f"{min(found)}-{max(found)}"


def _authors_flops(policy: "Policy", steps: int, layout: "Layout") -> int | None:
    try:
        return policy.reference_flops(steps, layout, GUIDED)
    except NotImplementedError:
        return None


def _ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"; of many spans the first, and how many more."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    if len(shown) <= MOST_SPANS:
        return ", ".join(shown)
    return f"{', '.join(shown[:MOST_SPANS])} and {len(shown) - MOST_SPANS} more"
