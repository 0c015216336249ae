"""A plan per step of one generation: what every policy compiles to."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastcache.errors import ScheduleError
from fastcache.files.json_text import parse_json
from fastcache.files.whole import write_text_whole
from fastcache.plan.actions import Action, Kind
from fastcache.plan.drawing import draw_schedules
from fastcache.plan.editing import union_of_steps, with_branch_replaced
from fastcache.plan.layout import Branch, Layout
from fastcache.plan.published import publish
from fastcache.plan.selection import Selection
from fastcache.plan.step import StepPlan, full_step, skip_step

FORMAT = "fastcache-schedule/1"


@dataclass(frozen=True)
class Schedule:
    """A plan per step of one generation, in execution order.

    `policy` and `fields` are for people to read; `selection` says how refreshed tokens are chosen.
    """

    layout: Layout
    steps: tuple[StepPlan, ...]
    policy: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise ScheduleError("steps: a schedule needs at least one step")
        for step in self.distinct:
            if step.layout is not self.layout and step.layout != self.layout:
                index = next(index for index, other in enumerate(self.steps) if other is step)
                raise ScheduleError(f"steps[{index}]: was made for another layout")
        if self.refreshed and self.selection is None:
            raise ScheduleError(
                "selection: a schedule that refreshes tokens says how they are chosen, got None"
            )

    @property
    def num_steps(self) -> int:
        """Model evaluations per generation."""
        return len(self.steps)

    @cached_property
    def distinct(self) -> tuple[StepPlan, ...]:
        """The step objects, each once: policies share one among steps that do the same."""
        return tuple({id(step): step for step in self.steps}.values())

    @cached_property
    def uncached(self) -> bool:
        """True if every step computes every branch: nothing is ever reused."""
        return all(step.kind == "full" for step in self.distinct)

    @cached_property
    def skips(self) -> bool:
        """True if some step skips the trunk."""
        return any(step.skip for step in self.distinct)

    @cached_property
    def refreshed(self) -> frozenset[int]:
        """Branches (indices in the plan) that some step refreshes."""
        return frozenset(
            index
            for step in self.distinct
            for index, action in enumerate(step.actions)
            if action.kind is Kind.REFRESH
        )

    @cached_property
    def history(self) -> int:
        """Features that must be kept per branch: one, or as many as the highest order needs."""
        return 1 + max((action.order or 0 for step in self.distinct for action in step.actions), default=0)

    def kinds(self) -> dict[str, int]:
        """Number of steps of each kind."""
        return dict(Counter(step.kind for step in self.steps))

    def flops(self, batch: int = 1) -> int:
        """FLOPs of one generation (StepPlan.flops summed)."""
        return sum(step.flops(batch) for step in self.steps)

    def uncached_flops(self, batch: int = 1) -> int:
        """FLOPs of the same generation with every branch computed at every step."""
        return self.num_steps * full_step(self.layout).flops(batch)

    def ideal_speedup(self) -> float:
        """Uncached FLOPs / planned FLOPs: the speedup if time were matrix multiplies alone."""
        return self.uncached_flops() / self.flops()

    def to_json(self) -> str:
        """The schedule as JSON text; `from_json` gives an equal schedule back."""
        layout = self.layout
        return json.dumps(
            {
                "format": FORMAT,
                "policy": self.policy,
                "fields": self.fields,
                "selection": None if self.selection is None else self.selection.to_dict(),
                "layout": {
                    "family": layout.family,
                    "tokens": layout.tokens,
                    "width": layout.width,
                    "heads": layout.heads,
                    "fixed_flops": layout.fixed_flops,
                    "modulation_flops": layout.modulation_flops,
                    "branches": [
                        [branch.block, branch.name, branch.flops_per_token, branch.flops_per_pair]
                        for branch in layout.branches
                    ],
                },
                "steps": [_step_text(step) for step in self.steps],
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Schedule":
        """Read `to_json`'s form. Raises ScheduleError naming the entry that does not fit."""
        return Schedule._from_parsed(text, "schedule")

    @staticmethod
    def _from_parsed(text: str | bytes, where: str) -> "Schedule":
        try:
            found = parse_json(text, where)
        except ValueError as error:
            raise ScheduleError(str(error)) from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ScheduleError(
                f"format: expected {FORMAT!r}, got"
                f" {found.get('format') if isinstance(found, dict) else type(found).__name__!r}"
            )
        try:
            shape = dict(found["layout"])
            layout = Layout(**{**shape, "branches": tuple(Branch(*entry) for entry in shape["branches"])})
            steps = tuple(_step_from_text(layout, index, line) for index, line in enumerate(found["steps"]))
            selection = None if found.get("selection") is None else Selection(**found["selection"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScheduleError(f"{where}: missing or malformed entry: {error}") from None
        return Schedule(layout, steps, found.get("policy", ""), found.get("fields", {}), selection)

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_text_whole(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Schedule":
        """Read a file that `save` wrote."""
        return Schedule._from_parsed(Path(path).read_bytes(), f"schedule: {path}")

    def to_smoothcache(self) -> dict[str, list[int]]:
        """SmoothCache's published form (see fastcache.plan.published): {"attn": [1, 0, ...]}, 1 = compute."""
        return publish(self.steps).to_dict()

    def union(self, other: "Schedule") -> "Schedule":
        """Compute where either computes, refresh the larger number of tokens where either refreshes.

        Where neither does, this schedule's action stays. A step skips the trunk only if it does in both.
        Raises ScheduleError if the schedules are for other hosts or step counts, or choose tokens
        differently.
        """
        steps = union_of_steps(self.steps, other.steps)
        if None not in (self.selection, other.selection) and self.selection != other.selection:
            raise ScheduleError(
                "union: the schedules choose their refreshed tokens differently; give one the selection of"
                " the other with dataclasses.replace"
            )
        policy = f"{self.policy} | {other.policy}"
        return Schedule(self.layout, steps, policy, {}, self.selection or other.selection)

    def with_branch(
        self, name: str, action: Action, *, block: int | None = None, steps: Iterable[int] | None = None
    ) -> "Schedule":
        """A schedule in which the branches `name`, of one block or all, do `action` at `steps` (all if None).

        Raises ScheduleError if nothing matches, a step is out of range or skips the trunk, or a branch
        would use a stored feature before it computes one.
        """
        edited = with_branch_replaced(self.steps, name, action, block=block, at=steps)
        return replace(self, steps=edited, policy=f"{self.policy}, edited".lstrip(", "))

    def draw(self, path: str | Path) -> None:
        """Write a picture of what every step (across) and branch (down) does. Needs matplotlib."""
        draw_schedules({self.policy or "schedule": self}, path)


def _step_text(step: StepPlan) -> str:
    actions = " ".join(action.code for action in step.actions)
    if not step.skip:
        return actions
    return f"skip {actions}" if step.run_blocks else "skip"


def _step_from_text(layout: Layout, index: int, line: str | Sequence[str]) -> StepPlan:
    codes = str(line).split()
    skip = codes[:1] == ["skip"]
    if codes == ["skip"]:
        return skip_step(layout)
    try:
        return StepPlan(layout, tuple(Action.from_code(code) for code in codes[skip:]), skip)
    except ScheduleError as error:
        raise ScheduleError(f"steps[{index}]: {error}") from None
