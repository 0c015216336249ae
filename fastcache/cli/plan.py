"""`fastcache plan`."""

from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console
from rich.table import Table
from typer import BadParameter, Option

from fastcache.cli.policy_options import PolicyFields, PolicyName, policy_from
from fastcache.hosts import recognise
from fastcache.models import PRESETS, DiT
from fastcache.plan.actions import Kind
from fastcache.plan.drawing import draw_schedules
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan
from fastcache.policies import Policy
from fastcache.workshop.glyphs.train import CONFIG as GLYPHS

GUIDED = 2


def plan(
    policy: PolicyName = "fora",
    fields: PolicyFields = None,
    steps: Annotated[int, Option(min=1, help="Model evaluations of a generation.")] = 50,
    model: Annotated[str, Option(help="A published size such as DiT-XL/2, or glyphs.")] = "DiT-XL/2",
    input_size: Annotated[int, Option(help="Side of the latent: 32 for 256 px, 64 for 512 px.")] = 32,
    draw: Annotated[Path | None, Option(help="Also draw the plan to this PNG.")] = None,
    save: Annotated[Path | None, Option(help="Also write the plan to this JSON file.")] = None,
) -> None:
    """Show what a policy does at every step of a model, and what that costs, without running it."""
    chosen, layout = policy_from(policy, fields), layout_of(model, input_size)
    if chosen is None:
        raise BadParameter("--policy: name the policy whose plan to show")
    try:
        schedule = chosen.schedule(steps, layout)
    except ValueError as error:
        raise BadParameter(f"--set: {error}") from error
    console = Console()
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
        draw_schedules({f"{schedule.policy} on {model}": schedule}, draw)
        console.print(f"drawn: {draw}")
    if save is not None:
        schedule.save(save)
        console.print(f"saved: {save}")


def layout_of(model: str, input_size: int) -> Layout:
    """The branches of a reference model, without allocating its weights."""
    if model != "glyphs" and model not in PRESETS:
        raise BadParameter(f"--model: expected glyphs or one of {', '.join(PRESETS)}, got {model!r}")
    with torch.device("meta"):
        built = DiT.from_config(GLYPHS) if model == "glyphs" else DiT.preset(model, input_size)
    return recognise(built).layout()


def table_of(schedule: Schedule, model: str) -> Table:
    """A line per kind of step, and the sum."""
    settings = ", ".join(f"{name}={value}" for name, value in schedule.fields.items())
    table = Table(
        title=f"{schedule.policy}({settings}) on {model}, {schedule.num_steps} steps",
        caption=(
            f"ideal speedup {schedule.ideal_speedup():.2f}x (FLOPs of the whole model, one sample, without"
            " guidance)"
        ),
    )
    for heading in ("kind", "steps", "GFLOPs a step", "GFLOPs", "at"):
        table.add_column(heading, justify="left" if heading in ("kind", "at") else "right")
    for kind in schedule.kinds():
        at = [index for index, step in enumerate(schedule.steps) if step.kind == kind]
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


def tokens_of(schedule: Schedule) -> Table:
    """A line per run of equal steps that refresh tokens: how many in each branch, over all blocks."""
    names = [
        name
        for name in schedule.layout.names
        if any(schedule.layout.branches[index].name == name for index in schedule.refreshed)
    ]
    table = Table(title=f"refreshed of {schedule.layout.tokens} tokens", caption="fewest-most of any block")
    for heading in ("steps", "kind", *names):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    lines = [(step.kind, *(_tokens(step, name) for name in names)) for step in schedule.steps]
    for line in dict.fromkeys(lines):
        at = [index for index, other in enumerate(lines) if other == line]
        if any(line[1:]):
            table.add_row(_ranges(at), *line)
    return table


def _tokens(step: StepPlan, name: str) -> str:
    """ "21-32", "0" or, for a branch that refreshes none, nothing."""
    found = [
        action.fresh_tokens
        for action, branch in zip(step.actions, step.layout.branches, strict=True)
        if branch.name == name and action.kind is Kind.REFRESH
    ]
    if not found:
        return ""
    return str(found[0]) if min(found) == max(found) else f"{min(found)}-{max(found)}"


def _authors_flops(policy: Policy, steps: int, layout: Layout) -> int | None:
    try:
        return policy.reference_flops(steps, layout, GUIDED)
    except NotImplementedError:
        return None


def _ranges(indices: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(
        str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)
    )
