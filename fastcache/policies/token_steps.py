"""Which steps of ToCa and DuCa are full, partial or skipped.

Method: docs/methods/toca.md and duca.md, "Step kinds".
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastcache.policies.fresh_ratio import Line


@dataclass(frozen=True)
class TokenStep:
    """What a step computes in full; what it does not is refreshed or reused, as the host's rules say.

    full: names of the branches that every block computes. head: block 0 computes all of its own
    besides. skip: the trunk's last output is used instead.
    """

    full: frozenset[str] = frozenset()
    head: bool = False
    skip: bool = False

    def computes(self, block: int, branch: str) -> bool:
        """True if this branch runs on all tokens."""
        return branch in self.full or (self.head and block == 0)


PARTIAL = TokenStep()
SKIP = TokenStep(skip=True)


class Cycle(abc.ABC):
    """The order of full, partial and skipped steps of a host."""

    descending: bool  # the host's sampler numbers its steps num_steps - 1 ... 0

    def numbered(self, k: int, num_steps: int) -> int:
        """The number that the host's sampler gives to the k-th executed step."""
        return num_steps - 1 - k if self.descending else k

    @abc.abstractmethod
    def steps(
        self, threshold: int, num_steps: int, branches: tuple[str, ...], *, adapt: bool, flips: bool
    ) -> list[TokenStep]:
        """All steps in execution order.

        threshold: base interval. adapt: let the interval follow the step. flips: decide anew after
        block 0 of a full step, as the originals do.
        """


@dataclass(frozen=True)
class AdaptiveCycle(Cycle):
    """A step whose number is a multiple of the current interval is full, and so is the first one.

    After a full step the interval is threshold / pace, rounded; `sensitive` is the span of steps, as
    shares of all, that has an interval of 2 instead. alternate: of the steps between, those with an
    odd remainder are partial and the others skipped (DuCa); otherwise all are partial (ToCa).
    """

    descending: bool
    pace: Line
    sensitive: tuple[float, float] | None = None
    alternate: bool = False

    def steps(
        self, threshold: int, num_steps: int, branches: tuple[str, ...], *, adapt: bool, flips: bool
    ) -> list[TokenStep]:
        full = TokenStep(full=frozenset(branches))
        found, interval = [], threshold
        for k in range(num_steps):
            number = self.numbered(k, num_steps)
            step = full if k == 0 else self._between(number, interval) or full
            if step == full:
                interval = self.interval_after(number, threshold, num_steps) if adapt else threshold
                # the original's later blocks look at the interval that block 0 has just set
                other = self._between(number, interval) if flips and k > 0 else None
                step = full if other is None else TokenStep(head=True, skip=other.skip)
            found.append(step)
        return found

    def interval_after(self, number: int, threshold: int, num_steps: int) -> int:
        """The interval that a full step of this number sets: float32, halves to even."""
        if self.sensitive is not None and int(self.sensitive[0] * num_steps) <= number < int(
            self.sensitive[1] * num_steps
        ):
            return 2
        return int(np.rint(np.float32(threshold) / np.float32(self.pace.at(number, num_steps))))

    def _between(self, number: int, interval: int) -> TokenStep | None:
        remainder = number % interval
        if remainder == 0:
            return None
        return SKIP if self.alternate and remainder % 2 == 0 else PARTIAL


@dataclass(frozen=True)
class ModuleCycle(Cycle):
    """Fixed intervals by branch, after `warmup` full steps; `skipped`: remainder by 3 of skipped steps.

    The threshold plays no part in it.
    """

    intervals: Mapping[str, int]
    warmup: int
    skipped: int | None = None
    descending: bool = False

    def steps(
        self, threshold: int, num_steps: int, branches: tuple[str, ...], *, adapt: bool, flips: bool
    ) -> list[TokenStep]:
        return [self._step(k) for k in range(num_steps)]

    def _step(self, k: int) -> TokenStep:
        if k < self.warmup:
            return TokenStep(full=frozenset(self.intervals))
        if k % 3 == self.skipped:
            return SKIP
        return TokenStep(
            full=frozenset(name for name, interval in self.intervals.items() if k % interval == 0)
        )
