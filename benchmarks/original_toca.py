"""ToCa and DuCa on a DiT as their originals execute them: every block chooses its own tokens, one small operator after the other.

Written from spec sections 2, 3 and 8 (Zou et al., "Accelerating Diffusion Transformers with
Token-wise Feature Caching" and "... with Dual Feature Caching"). A full step with `attention` scores
multiplies, keeps and averages whole softmax maps. A partial block computes all of its modulation,
reuses attention, scores every token anew, sorts them all, gathers K, runs the MLP on them and
scatters the result.

Left out, in the baseline's favour: the originals evaluate the kind of a step and the share of tokens
again in every block, on 0-dim CPU tensors (7 of the 42 operators that the specification counts).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.original import Original
from fastcache.models import DiT
from fastcache.models.dit import Attention, Block, modulate
from fastcache.schedule import Kind, Schedule, Score, Selection

SCORES = (Score.ATTENTION, Score.KV_NORM)


class OriginalToCa(Original):
    """The blocks of a DiT follow a schedule of ToCa or DuCa, the flips in the middle of a step included."""

    def __init__(self, model: DiT, schedule: Schedule) -> None:
        super().__init__(model)
        if schedule.selection is None or schedule.selection.score not in SCORES:
            raise ValueError(
                f"schedule: expected one of ToCa or DuCa with cache_type {' or '.join(score.value for score in SCORES)}, got {schedule.policy}({schedule.fields})"
            )
        self._schedule, self._selection = schedule, schedule.selection
        self._mlp_index = [
            next(index for index, branch in schedule.layout.branches_of(number) if branch.name == "mlp")
            for number in range(len(self._blocks))
        ]
        self._features: dict[tuple[int, str], Tensor] = {}
        self._taken: dict[int, Tensor] = {}  # by block: attention map [B, N, N], or value norms [B, H, N]
        self._counts: dict[int, Tensor] = {}
        self._hidden: Tensor | None = None

    def block(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        plan = self._schedule.steps[self.step]
        action = plan.actions[self._mlp_index[number]]
        if action.kind is Kind.COMPUTE:
            output = self._full(number, block, x, c)
        else:
            output = x if plan.skip else self._partial(number, block, x, c, action.tokens)
        if number == len(self._blocks) - 1:
            output = self._hidden = self._hidden if plan.skip else output
        return output

    def clear(self) -> None:
        for kept in (self._features, self._taken, self._counts):
            kept.clear()
        self._hidden = None

    def _full(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        attended, self._taken[number] = attention_and_score(
            block.attn, modulate(block.norm1(x), shift1, scale1), self._selection.score
        )
        self._features[number, "attn"] = attended
        x = x + gate1[:, None] * attended
        feature = self._features[number, "mlp"] = block.mlp(modulate(block.norm2(x), shift2, scale2))
        self._counts[number] = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        return x + gate2[:, None] * feature

    def _partial(self, number: int, block: Block, x: Tensor, c: Tensor, tokens: int) -> Tensor:
        _, _, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self._features[number, "attn"]
        chosen = choose(
            base_score(self._taken[number], self._selection.score),
            self._counts[number],
            tokens,
            self._selection,
            self._schedule.fields,
        )
        columns = chosen[..., None].expand(-1, -1, x.shape[-1])
        fresh = block.mlp(modulate(block.norm2(x.gather(1, columns)), shift2, scale2))
        feature = self._features[number, "mlp"].scatter_(1, columns, fresh.to(x.dtype))
        return x + gate2[:, None] * feature


def attention_and_score(attention: Attention, h: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """(output, what scores are computed from): the map's mean over heads, or the values' norms beside flash attention."""
    batch, tokens, channels = h.shape
    q, k, v = (
        attention.qkv(h)
        .view(batch, tokens, 3, attention.num_heads, channels // attention.num_heads)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    if score is Score.KV_NORM:
        attended, taken = F.scaled_dot_product_attention(q, k, v), v.norm(dim=-1)
    else:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        attended, taken = weights @ v, weights.mean(1)
    return attention.proj(attended.transpose(1, 2).reshape(batch, tokens, channels)), taken


def base_score(taken: Tensor, score: Score) -> Tensor:
    """[B, N] float32: the attention that a token received, or the sum over heads of 1 - ||v||."""
    return (1 - taken if score is Score.KV_NORM else taken).sum(1, dtype=torch.float32)


def choose(base: Tensor, counts: Tensor, tokens: int, selection: Selection, fields: dict) -> Tensor:
    """[B, K] int64, in order of score; the counts [B, N] are written. All of this for every block."""
    score = F.normalize(base, dim=-1)
    if selection.age_weight:
        score = score + fields["soft_fresh_weight"] * counts / fields["fresh_threshold"]
    if selection.cell:
        score = with_bonus(score, selection.cell, selection.bonus)
    chosen = score.argsort(dim=-1, descending=True)[:, :tokens]
    counts.add_(1).scatter_(1, chosen, 0)
    return chosen


def with_bonus(score: Tensor, cell: int, bonus: float) -> Tensor:
    """[B, N] in which the best token of every cell x cell square has gained bonus times its own score."""
    batch, tokens = score.shape
    lines = math.isqrt(tokens) // cell
    cells = (
        score.view(batch, lines, cell, lines, cell)
        .permute(0, 1, 3, 2, 4)
        .reshape(batch, lines * lines, cell * cell)
    )
    best, where = cells.max(dim=-1, keepdim=True)
    cells = cells + torch.zeros_like(cells).scatter_(-1, where, bonus * best)
    return cells.view(batch, lines, lines, cell, cell).permute(0, 1, 3, 2, 4).reshape(batch, tokens)
