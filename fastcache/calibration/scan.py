"""SmoothCache's calibration: from errors between steps to a schedule. Pure host arithmetic.

Method: docs/methods/smoothcache.md, "Calibration".
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastcache.errors import ScheduleError
from fastcache.plan.layout import Layout
from fastcache.plan.published import PublishedSchedule

Rows = tuple[
    tuple[float, ...], ...
]  # E_0..E_{K-1}; E_j[i] is the error of computing at i and reusing at i + j + 1


def greedy_schedule(errors: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """1 (compute) or 0 (reuse) for each of T steps, T = len(errors[0]) + 1.

    From a computed step i the scan takes the farthest reuse whose own error is at most `threshold`:
    errors[j][i] allows steps i + 1 ... i + j + 1; nearer errors are not looked at. The first and
    the last step compute. At most len(errors) steps in a row are reused. NaN allows nothing.
    Liu et al., "SmoothCache".
    """
    num_steps = _steps_of(errors)
    schedule = [1] * num_steps
    i = 0
    while i < num_steps:
        reach = next(
            (j + 1 for j in reversed(range(len(errors))) if i < len(errors[j]) and errors[j][i] <= threshold),
            0,
        )
        schedule[i + 1 : i + 1 + reach] = [0] * reach
        i += reach + 1
    schedule[-1] = 1
    return schedule


@dataclass(frozen=True)
class ErrorCurves:
    """Errors [branch][j][i] of a host's branches, averaged over `samples` runs.

    E_j[i] = sum|y_i - y_{i+j+1}| / sum|y_{i+j+1}| for the outputs y of a branch at steps i and
    i + j + 1, over the whole batch; row j has T - 1 - j entries.
    """

    layout: Layout
    errors: tuple[Rows, ...]
    samples: int = 1

    def __post_init__(self) -> None:
        if len(self.errors) != len(self.layout.branches):
            raise ValueError(
                f"errors: expected rows for each of {len(self.layout.branches)} branches, got"
                f" {len(self.errors)}"
            )
        shapes = {(_steps_of(rows), len(rows)) for rows in self.errors}
        if len(shapes) != 1:
            raise ValueError(
                f"errors: expected one number of steps and look-aheads in all branches, got {sorted(shapes)}"
            )

    @property
    def num_steps(self) -> int:
        """Steps T of a run."""
        return len(self.errors[0][0]) + 1

    @property
    def lookahead(self) -> int:
        """Largest number K of consecutive reuses."""
        return len(self.errors[0])

    def keyed(self, per_layer: bool = False) -> dict[str, Rows]:
        """Errors by key of the published form: by branch name, averaged over blocks, or by branch."""
        if per_layer:
            return {
                f"{branch.name}-{branch.block}": rows
                for branch, rows in zip(self.layout.branches, self.errors, strict=True)
            }
        return {name: self._mean_of(name) for name in self.layout.names}

    def published(self, threshold: float, per_layer: bool = False) -> PublishedSchedule:
        """The greedy schedule of every key."""
        return PublishedSchedule(
            tuple(
                (key, tuple(greedy_schedule(rows, threshold))) for key, rows in self.keyed(per_layer).items()
            )
        )

    def threshold_for(self, target_speedup: float, per_layer: bool = False) -> float:
        """The smallest threshold whose schedule's ideal speedup (Schedule.ideal_speedup) is at least the
        target.

        A larger threshold may compute more steps (only the farthest error is tested), so the search
        looks at every value at which some schedule changes: the errors themselves, in rising order.
        Raises ScheduleError naming the largest speedup within reach.
        """
        if not target_speedup >= 1.0 or math.isinf(target_speedup):
            raise ValueError(f"target_speedup: expected a finite number >= 1, got {target_speedup!r}")
        keyed = self.keyed(per_layer)
        costs = self._costs(keyed)
        constant = self.num_steps * (
            self.layout.fixed_flops + self.layout.modulation_flops * self.layout.depth
        )
        total = uncached = constant + self.num_steps * sum(costs.values())
        if self.layout.tokens <= 0 or uncached == constant:
            raise ScheduleError(
                "target_speedup: the host's layout has no token count or FLOPs to measure a speedup by; pass"
                " threshold instead"
            )
        computed = dict.fromkeys(keyed, self.num_steps)
        changes = sorted(
            (value, key)
            for key, rows in keyed.items()
            for value in {value for row in rows for value in row}
            if math.isfinite(value)
        )
        best = (1.0, 0.0)
        if target_speedup == 1.0:
            return 0.0
        for index, (value, key) in enumerate(changes):
            count = sum(greedy_schedule(keyed[key], value))
            total += (count - computed[key]) * costs[key]
            computed[key] = count
            if index + 1 < len(changes) and changes[index + 1][0] == value:
                continue
            best = max(best, (uncached / total, -value))
            if uncached / total >= target_speedup * (1 - 1e-12):
                return value
        raise ScheduleError(
            f"target_speedup: {target_speedup:g} is out of reach with a look-ahead of {self.lookahead}; at"
            f" most {best[0]:.2f} (threshold {-best[1]:.4g}). Raise lookahead, or ask for less"
        )

    def _costs(self, keyed: Mapping[str, Rows]) -> dict[str, int]:
        """FLOPs of one computed step per key."""
        costs = dict.fromkeys(keyed, 0)
        tokens = self.layout.tokens
        for branch in self.layout.branches:
            key = branch.name if branch.name in costs else f"{branch.name}-{branch.block}"
            costs[key] += branch.flops(tokens, tokens)
        return costs

    def _mean_of(self, name: str) -> Rows:
        chosen = [
            rows
            for branch, rows in zip(self.layout.branches, self.errors, strict=True)
            if branch.name == name
        ]
        return tuple(
            tuple(sum(values) / len(values) for values in zip(*rows_j, strict=True))
            for rows_j in zip(*chosen, strict=True)
        )


def _steps_of(errors: Sequence[Sequence[float]]) -> int:
    if not errors:
        raise ValueError("errors: expected at least one row E_0, got none")
    num_steps = len(errors[0]) + 1
    for j, row in enumerate(errors):
        if len(row) != max(0, num_steps - 1 - j):
            raise ValueError(
                f"errors[{j}]: expected {max(0, num_steps - 1 - j)} values for {num_steps} steps, got"
                f" {len(row)}"
            )
    return num_steps
