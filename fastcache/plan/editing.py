"""Schedules made from schedules."""

from collections.abc import Iterable
from dataclasses import replace

from fastcache.errors import ScheduleError
from fastcache.plan.schedule import Action, Kind, Schedule, StepPlan


def union(first: Schedule, second: Schedule) -> Schedule:
    """Compute where either computes, refresh the larger number of tokens where either refreshes.

    Where neither does, the first's action stays. A step skips the trunk only if it does in both.
    Raises ScheduleError if the schedules are for other hosts or step counts, or choose tokens differently.
    """
    if first.layout != second.layout:
        raise ScheduleError(
            f"union: expected schedules of one layout, got {first.layout.family} with"
            f" {len(first.layout.branches)} branches and {second.layout.family} with"
            f" {len(second.layout.branches)}"
        )
    if first.num_steps != second.num_steps:
        raise ScheduleError(
            f"union: expected schedules of one length, got {first.num_steps} and {second.num_steps} steps"
        )
    if None not in (first.selection, second.selection) and first.selection != second.selection:
        raise ScheduleError(
            "union: the schedules choose their refreshed tokens differently; give one the selection of the"
            " other with dataclasses.replace"
        )
    steps = tuple(_union_of_steps(a, b) for a, b in zip(first.steps, second.steps, strict=True))
    return Schedule(
        first.layout, steps, f"{first.policy} | {second.policy}", {}, first.selection or second.selection
    )


def with_branch(
    schedule: Schedule,
    name: str,
    action: Action,
    *,
    block: int | None = None,
    steps: Iterable[int] | None = None,
) -> Schedule:
    """A schedule in which the branches `name` (of one block, or of all) do `action` at `steps` (all if None).

    Raises ScheduleError if nothing matches, a step is out of range or skips the trunk, or a branch
    would use a stored feature before it computes one.
    """
    layout = schedule.layout
    chosen = {
        index
        for index, branch in enumerate(layout.branches)
        if branch.name == name and block in (None, branch.block)
    }
    if not chosen:
        raise ScheduleError(
            f"name, block: expected one of {', '.join(layout.names)} in blocks 0..{layout.depth - 1}, got"
            f" {name!r} of block {block}"
        )
    at = set(range(schedule.num_steps) if steps is None else steps)
    outside = sorted(step for step in at if not 0 <= step < schedule.num_steps)
    if outside:
        raise ScheduleError(
            f"steps: expected 0..{schedule.num_steps - 1}, got {', '.join(map(str, outside))}"
        )
    skipped = sorted(step for step in at if schedule.steps[step].skip)
    if skipped:
        raise ScheduleError(
            f"steps: {', '.join(map(str, skipped))} skip the trunk, where branches do nothing"
        )
    plans = tuple(
        (
            replace(
                plan,
                actions=tuple(action if index in chosen else old for index, old in enumerate(plan.actions)),
            )
            if step in at
            else plan
        )
        for step, plan in enumerate(schedule.steps)
    )
    for index in sorted(chosen):
        if plans[0].actions[index].kind is not Kind.COMPUTE:
            branch = layout.branches[index]
            raise ScheduleError(
                f"steps: step 0 must compute {branch.name} of block {branch.block}, nothing is stored before;"
                " leave step 0 out of steps"
            )
    return replace(schedule, steps=plans, policy=f"{schedule.policy}, edited".lstrip(", "))


def _union_of_steps(first: StepPlan, second: StepPlan) -> StepPlan:
    if first.skip != second.skip:
        return second if first.skip else first
    return StepPlan(
        first.layout,
        tuple(_stronger(a, b) for a, b in zip(first.actions, second.actions, strict=True)),
        first.skip,
    )


def _stronger(first: Action, second: Action) -> Action:
    return second if _work(second) > _work(first) else first


def _work(action: Action) -> tuple[int, int]:
    rank = {Kind.COMPUTE: 2, Kind.REFRESH: 1}.get(action.kind, 0)
    return rank, action.tokens or 0
