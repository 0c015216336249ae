"""Steps made from steps."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastcache.errors import ScheduleError
from fastcache.plan.actions import Action, Kind
from fastcache.plan.step import StepPlan


def union_of_steps(first: Sequence[StepPlan], second: Sequence[StepPlan]) -> tuple[StepPlan, ...]:
    """Compute where either does, refresh the larger number of tokens; see Schedule.union."""
    if first[0].layout != second[0].layout:
        a, b = first[0].layout, second[0].layout
        raise ScheduleError(
            f"union: expected schedules of one layout, got {a.family} with {len(a.branches)} branches and"
            f" {b.family} with {len(b.branches)}"
        )
    if len(first) != len(second):
        raise ScheduleError(
            f"union: expected schedules of one length, got {len(first)} and {len(second)} steps"
        )
    return tuple(_union_of_two(a, b) for a, b in zip(first, second, strict=True))


def with_branch_replaced(
    steps: Sequence[StepPlan], name: str, action: Action, *, block: int | None, at: Iterable[int] | None
) -> tuple[StepPlan, ...]:
    """Steps in which branches `name` do `action`; see Schedule.with_branch."""
    layout = steps[0].layout
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
    wanted = set(range(len(steps)) if at is None else at)
    outside = sorted(step for step in wanted if not 0 <= step < len(steps))
    if outside:
        raise ScheduleError(f"steps: expected 0..{len(steps) - 1}, got {', '.join(map(str, outside))}")
    skipped = sorted(step for step in wanted if steps[step].skip)
    if skipped:
        raise ScheduleError(
            f"steps: {', '.join(map(str, skipped))} skip the trunk, where branches do nothing"
        )
    plans = tuple(
        _with_actions(plan, chosen, action) if step in wanted else plan for step, plan in enumerate(steps)
    )
    for index in sorted(chosen):
        if plans[0].actions[index].kind is not Kind.COMPUTE:
            branch = layout.branches[index]
            raise ScheduleError(
                f"steps: step 0 must compute {branch.name} of block {branch.block}, nothing is stored before;"
                " leave step 0 out of steps"
            )
    return plans


def _with_actions(plan: StepPlan, chosen: set[int], action: Action) -> StepPlan:
    return replace(
        plan, actions=tuple(action if index in chosen else old for index, old in enumerate(plan.actions))
    )


def _union_of_two(first: StepPlan, second: StepPlan) -> StepPlan:
    if first.skip != second.skip:
        return second if first.skip else first
    actions = tuple(_stronger(a, b) for a, b in zip(first.actions, second.actions, strict=True))
    return StepPlan(first.layout, actions, first.skip)


def _stronger(first: Action, second: Action) -> Action:
    return second if _work(second) > _work(first) else first


def _work(action: Action) -> tuple[int, int]:
    rank = {Kind.COMPUTE: 2, Kind.REFRESH: 1}.get(action.kind, 0)
    return rank, action.tokens or 0
