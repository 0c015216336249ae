"""Choosing the tokens of every layer of a step: sorting per layer as the original does, torch.topk, and one launch of ours.

Every contender normalises, ages and gives the bonus of ToCa on a DiT, writes the ages, and makes what
its refresh needs: indices [B, K] per layer, or (topk and ours) slot maps too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.original_toca import choose, with_bonus
from benchmarks.token_cases import ChoiceCase
from fastcache.ops import select_tokens_
from fastcache.policies import ToCa
from fastcache.policies.toca import DIT
from fastcache.schedule import Score, Selection

POLICY = ToCa(fresh_threshold=3)
SELECTION = Selection(Score.ATTENTION, POLICY.soft_fresh_weight / POLICY.fresh_threshold, DIT.cell, DIT.bonus)
NAIVE, TOPK, BEST, OURS = "naive", "topk per layer", "best eager", "fastcache"


@dataclass(frozen=True)
class ChoiceInputs:
    """scores [L, B, N] float32; ages [L, B, N] int32, written; counts: K per layer, and [L * B] int32 on the device."""

    scores: Tensor
    ages: Tensor
    counts: tuple[int, ...]
    device_counts: Tensor
    side: int


def make_choice(case: ChoiceCase, device: torch.device, seed: int = 0) -> ChoiceInputs:
    """Scores of one size that differ from token to token by more than rounding, and ages of 0 to 2."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.layers, case.size.batch, case.size.tokens)
    order = torch.rand(shape, generator=generator, device=device).argsort(-1)
    ages = torch.randint(0, 3, shape, generator=generator, device=device, dtype=torch.int32)
    counts = torch.tensor(case.counts, dtype=torch.int32, device=device).repeat_interleave(case.size.batch)
    return ChoiceInputs(
        1 + order / case.size.tokens, ages, tuple(case.counts), counts, round(case.size.tokens**0.5)
    )


def sorted_per_layer(i: ChoiceInputs) -> list[Tensor]:
    """The original: all of it per layer, and a whole sort."""
    fields = POLICY.fields()
    return [
        choose(score, ages, count, SELECTION, fields)
        for score, ages, count in zip(i.scores, i.ages, i.counts)
    ]


def topk_per_layer(i: ChoiceInputs) -> list[Tensor]:
    """The original's scores, torch.topk for the sort, and a slot map."""
    slots = []
    for score, ages, count in zip(i.scores, i.ages, i.counts):
        score = with_bonus(
            torch.add(F.normalize(score, dim=-1), ages, alpha=SELECTION.age_weight),
            SELECTION.cell,
            SELECTION.bonus,
        )
        slots.append(_taken(score, ages.add_(1), count))
    return slots


def scored_at_once(i: ChoiceInputs) -> list[Tensor]:
    """Scores of all layers in common operators; torch.topk, slot map and ages per layer, whose K differ."""
    score = torch.add(F.normalize(i.scores, dim=-1), i.ages, alpha=SELECTION.age_weight)
    score = with_bonus(score.flatten(0, 1), SELECTION.cell, SELECTION.bonus).view_as(score)
    i.ages.add_(1)
    return [_taken(one, ages, count) for one, ages, count in zip(score, i.ages, i.counts)]


def _taken(score: Tensor, ages: Tensor, count: int) -> Tensor:
    chosen = score.topk(count, dim=-1, sorted=False).indices
    ages.scatter_(1, chosen, 0)
    rows = torch.arange(count, dtype=torch.int32, device=score.device).expand_as(chosen)
    return torch.full(score.shape, -1, dtype=torch.int32, device=score.device).scatter_(1, chosen, rows)


def in_one_launch(i: ChoiceInputs) -> list[Tensor]:
    """Ours."""
    N = i.scores.shape[-1]
    found = select_tokens_(
        i.scores.view(-1, N),
        i.ages.view(-1, N),
        i.device_counts,
        max(i.counts),
        age_weight=SELECTION.age_weight,
        width=i.side,
        cell=SELECTION.cell,
        bonus=SELECTION.bonus,
    )
    return list(found)


CONTENDERS: dict[str, Callable[[ChoiceInputs], list[Tensor]]] = {
    NAIVE: sorted_per_layer,
    TOPK: topk_per_layer,
    BEST: scored_at_once,
    OURS: in_one_launch,
}


def bound(name: str, inputs: ChoiceInputs) -> Callable[[], list[Tensor]]:
    """A call without arguments."""
    return partial(CONTENDERS[name], inputs)
