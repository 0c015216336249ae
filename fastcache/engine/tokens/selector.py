"""Which tokens a refresh recomputes: scores, ages and choices of one call of a step.

Rows are the refreshed branches of the schedule, in execution order. Where scores are fixed before
the step, one launch chooses for every branch of the step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.backends.constants import constant_row
from fastcache.engine.tokens.tap import AttentionTap
from fastcache.errors import ScheduleError
from fastcache.ops import SlotMap, attention_received, row_score, select_tokens_, value_norm
from fastcache.plan.selection import Score, Selection


class TokenSelector:
    """Ages [L, B, N], base scores [B, N] per row, and the choice at every refresh."""

    def __init__(self, selection: Selection, branches: Sequence[int]) -> None:
        self._selection = selection
        self._rows = {branch: row for row, branch in enumerate(branches)}
        self._scores: list[Tensor | None] = [None] * len(branches)
        self._stacked: Tensor | None = None
        self._ages: Tensor | None = None
        self._generators: tuple[torch.Generator, torch.Generator] | None = None
        self._guided: Tensor | None = None  # on the device: whether both halves of the batch show one picture
        self._chosen: dict[int, SlotMap] = {}

    def restart(self, branches: Sequence[int], x: Tensor) -> None:
        """These branches are computed in full now: their ages are zero again."""
        B, N, _ = x.shape
        rows = sorted(self._rows[branch] for branch in branches if branch in self._rows)
        if (
            self._ages is None
            or self._ages.shape[1:] != (B, N)
            or self._ages.device != x.device
            or len(rows) == len(self._rows)
        ):
            with torch.inference_mode(False):  # so that it can be written in any mode
                self._ages = torch.zeros(len(self._rows), B, N, dtype=torch.int32, device=x.device)
            return
        for first, last in runs(rows):
            self._ages[first:last].zero_()

    def take(self, branch: int, tap: AttentionTap) -> None:
        """Keep the base score that the tapped attention gives to `branch`."""
        if branch not in self._rows:
            return
        score = (
            value_norm(tap.v)
            if self._selection.score is Score.KV_NORM
            else attention_received(tap.q, tap.k, tap.lse, tap.scale)
        )
        self._scores[self._rows[branch]] = score
        self._stacked = None

    def choose_all(self, wanted: dict[int, int], capacities: dict[int, int], x: Tensor) -> None:
        """Choose wanted[branch] tokens for every branch of this step, in one launch for each run of rows."""
        self._chosen.clear()
        B, N, _ = x.shape
        rows = {self._rows[branch]: branch for branch in wanted}
        drawn = self._drawn(rows, B, N, x.device)
        for first, last in runs(sorted(rows)):
            counts = [min(wanted[rows[row]], N) for row in range(first, last)]
            if not any(counts):
                self._ages[first:last].add_(1)
                continue
            score = self._base(first, last, drawn, (last - first, B, N), x.device)
            slots = self._select(
                score.flatten(0, 1),
                self._ages[first:last].view(-1, N),
                [count for count in counts for _ in range(B)],
            ).view(last - first, B, N)
            for row in range(first, last):
                branch, count = rows[row], counts[row - first]
                if count:
                    self._chosen[branch] = SlotMap(slots[row - first], max(capacities[branch], count))

    def choose_here(self, branch: int, tokens: int, capacity: int, x: Tensor, feature: Tensor) -> SlotMap:
        """Choose by what the stream x is now, before the branch: scores `norm` and `similarity`."""
        score = row_score(x, None if self._selection.score is Score.NORM else feature)
        tokens = min(tokens, x.shape[1])
        slots = self._select(score, self._ages[self._rows[branch]], [tokens] * x.shape[0])
        self._chosen[branch] = SlotMap(slots, max(capacity, tokens))
        return self._chosen[branch]

    def age_all(self, branches: Sequence[int]) -> None:
        """Refreshes of no tokens: everyone is one step older."""
        for first, last in runs(sorted(self._rows[branch] for branch in branches)):
            self._ages[first:last].add_(1)

    def chosen(self, branch: int) -> SlotMap | None:
        """This step's choice for a branch, None where it chose nothing."""
        return self._chosen.get(branch)

    def begin_step(self) -> None:
        """Forget the choices of the step before."""
        self._chosen.clear()

    def see(self, sample: Tensor | None, condition: Tensor) -> None:
        """The latents [B, ...] that the model got and the condition [B, C] of its blocks, once a generation:
        a batch whose halves have equal latents and other conditions is guided. Nothing is read.
        """
        if self._guided is not None:
            return
        B, half = condition.shape[0], condition.shape[0] // 2
        if half == 0 or B % 2 or not isinstance(sample, Tensor) or sample.shape[:1] != (B,):
            self._guided = torch.zeros((), dtype=torch.bool, device=condition.device)
            return
        alike = (sample[:half] == sample[half:]).all().to(condition.device)
        self._guided = alike & (condition[:half] != condition[half:]).any()

    def begin_generation(self) -> None:
        """Random numbers start over."""
        self._generators = self._guided = None

    def _select(self, score: Tensor, ages: Tensor, counts: list[int]) -> Tensor:
        selection, N = self._selection, score.shape[1]
        return select_tokens_(
            score,
            ages,
            constant_row(tuple(counts), torch.int32, score.device),
            max(counts),
            age_weight=selection.age_weight,
            normalize=selection.score.normalized,
            width=token_grid_side(N, selection.cell) if selection.cell else 0,
            cell=selection.cell,
            bonus=selection.bonus,
        ).slots

    def _base(
        self, first: int, last: int, drawn: Tensor | None, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        score = self._selection.score
        if score is Score.STRAIGHT:
            return torch.ones(shape, device=device)
        if score is Score.RANDOM:
            return drawn[first:last]
        if self._stacked is None:
            self._stacked = torch.stack(self._scores)
        taken = self._stacked[first:last]
        if score is Score.COMPRESS:
            return 0.5 * drawn[first:last] + 0.5 * taken / taken.amax(-1, keepdim=True)
        return taken

    def _drawn(self, rows: dict[int, int], B: int, N: int, device: torch.device) -> Tensor | None:
        """Uniform numbers [L, B, N] of this step: the same for both halves of a guided batch, independent for
        the images of every other one.
        """
        if self._selection.score not in (Score.RANDOM, Score.COMPRESS):
            return None
        if self._generators is None or self._generators[0].device != device:
            seed = self._selection.seed
            self._generators = (
                torch.Generator(device).manual_seed(seed),
                torch.Generator(device).manual_seed(seed + 1),
            )
        half = B // 2
        first = torch.rand(len(self._rows), B - half, N, device=device, generator=self._generators[0])
        second = torch.rand(len(self._rows), half, N, device=device, generator=self._generators[1])
        if self._guided is None or half == 0 or B % 2:
            return torch.cat([first, second], 1)
        return torch.cat([first, torch.where(self._guided.to(device), first, second)], 1)


def token_grid_side(tokens: int, cell: int) -> int:
    """Tokens a line of a square grid whose side `cell` divides. Raises ScheduleError if there is none."""
    side = math.isqrt(tokens)
    if side * side != tokens or side % cell:
        raise ScheduleError(
            f"cell: the spatial bonus needs a square token grid whose side {cell} divides, got {tokens}"
            " tokens; use a policy or a Selection without a bonus (cell=0, bonus=0)"
        )
    return side


def runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges: 0, 1, 2, 5 -> (0, 3), (5, 6)."""
    present = set(rows)
    starts = [row for row in rows if row - 1 not in present]
    ends = [row + 1 for row in rows if row + 1 not in present]
    return list(zip(starts, ends, strict=True))
