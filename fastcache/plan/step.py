"""One step: an action for every branch."""

from dataclasses import dataclass
from functools import cached_property

from fastcache.errors import ScheduleError
from fastcache.plan.actions import COMPUTE, REUSE, Action, Kind
from fastcache.plan.layout import Layout


@dataclass(frozen=True)
class StepPlan:
    """The actions of one step, one per branch of the layout; `skip` replaces the whole trunk.

    In a skipped step a COMPUTE still runs its branch on the trunk's input and stores the feature,
    as the first block of DuCa's reference does when the interval changes in the middle of a step;
    every other action means nothing there.
    """

    layout: Layout
    actions: tuple[Action, ...]
    skip: bool = False

    def __post_init__(self) -> None:
        if len(self.actions) != len(self.layout.branches):
            raise ScheduleError(
                f"actions: expected one per branch ({len(self.layout.branches)}), got {len(self.actions)}"
            )

    @cached_property
    def kind(self) -> str:
        """full, reuse, partial, forecast or skip; mixed if full and cached branches meet."""
        if self.skip:
            return "skip"
        kinds = {action.kind for action in self.actions}
        if kinds <= {Kind.COMPUTE}:
            return "full"
        if Kind.COMPUTE in kinds:
            return "mixed"
        if Kind.REFRESH in kinds:
            return "partial"
        return "forecast" if Kind.FORECAST in kinds else "reuse"

    @cached_property
    def refreshes(self) -> bool:
        """True if some branch recomputes some tokens: not every partial step does."""
        return not self.skip and any(action.tokens for action in self.actions)

    def flops(self, batch: int = 1) -> int:
        """FLOPs of the whole model at this step: matrix multiplies and attention, 2 per MAC.

        The modulation projections of every block count in full, as the originals run them.
        """
        return batch * self._flops_of_a_sample

    @cached_property
    def _flops_of_a_sample(self) -> int:
        N = self.layout.tokens
        blocks = self.run_blocks
        total = self.layout.fixed_flops + self.layout.modulation_flops * len(blocks)
        for action, branch in zip(self.actions, self.layout.branches, strict=True):
            if branch.block not in blocks:
                continue
            if action.kind is Kind.COMPUTE:
                total += branch.flops(N, N)
            elif action.kind is Kind.REFRESH:
                total += branch.flops(min(action.fresh_tokens, N), N)
        return total

    @cached_property
    def run_blocks(self) -> frozenset[int]:
        """Blocks that do anything: all of them, or those that compute in a skipped step."""
        if not self.skip:
            return frozenset(branch.block for branch in self.layout.branches)
        return frozenset(
            branch.block
            for action, branch in zip(self.actions, self.layout.branches, strict=True)
            if action.kind is Kind.COMPUTE
        )


def full_step(layout: Layout) -> StepPlan:
    """A step that computes every branch."""
    return uniform_step(layout, COMPUTE)


def uniform_step(layout: Layout, action: Action) -> StepPlan:
    """A step in which every branch does the same."""
    return StepPlan(layout, (action,) * len(layout.branches))


def skip_step(layout: Layout) -> StepPlan:
    """A step that replaces the whole trunk by its last output."""
    return StepPlan(layout, (REUSE,) * len(layout.branches), skip=True)
