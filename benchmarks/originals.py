"""The caching methods as their originals execute them on a DiT: block by block, in small operators.

Written from the formulas of docs/methods; no original code was read, and no operator of FastCache runs here,
so that tests take it as the definition, in float64. A plan is all it knows of a method. Every block computes
all of its modulation; a refresh scores every token anew, sorts them all, gathers K and scatters the result;
with `attention` scores a full step keeps and averages whole softmax maps; a full step updates the
differences D_0 = F, D_{m+1} = (D_m - D_m of the full step before) / gap, and a forecast sums D_m distance^m
/ m!, one term at a time.

Left out, in the baseline's favour: ToCa and DuCa evaluate the kind of a step and the share of tokens again in
every block, on 0-dim CPU tensors (7 of 42 operators).
"""

import math
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.models import DiT
from fastcache.models.dit import Attention, Block, modulate
from fastcache.schedule import Action, Kind, Schedule, Score, Selection, StepPlan

Place = tuple[int, str]  # block and branch


class Original:
    """Context manager that runs the blocks of a DiT by a schedule. Set `step` before each model call."""

    def __init__(self, model: DiT, schedule: Schedule) -> None:
        self.step = 0
        self._blocks, self._schedule, self._selection = list(model.blocks), schedule, schedule.selection
        self._score = schedule.selection.score if schedule.selection else None
        self._branches = [schedule.layout.branches_of(number) for number in range(len(self._blocks))]
        self._clear()

    def __enter__(self) -> "Original":
        for number, block in enumerate(self._blocks):
            forward = lambda block, x, c, number=number: self._block(number, block, x, c)
            block.forward = MethodType(forward, block)
        return self

    def __exit__(self, *error: object) -> None:
        for block in self._blocks:
            del block.forward
        self._clear()

    def _clear(self) -> None:
        self._differences: dict[Place, list[Tensor]] = {}  # the feature first
        self._updated: dict[Place, int] = {}
        self._ages: dict[Place, Tensor] = {}
        self._taken: dict[int, Tensor] = {}  # by block: attention map [B, N, N], or value norms [B, H, N]
        self._hidden = self._generators = None
        self._running: frozenset[int] = frozenset()
        self._drawn: dict[int, Tensor] = {}

    def _block(self, number: int, block: Block, x: Tensor, c: Tensor) -> Tensor:
        plan = self._schedule.steps[self.step]
        if number == 0:
            self._running = plan.run_blocks
            self._draw(plan, x, c)
        if number in self._running:
            vectors = block.adaLN_modulation(c).chunk(6, dim=1)
            for index, branch in self._branches[number]:
                first = branch.name == "attn"
                body, norm = (block.attn, block.norm1) if first else (block.mlp, block.norm2)
                shift, scale, gate = vectors[:3] if first else vectors[3:]
                place, action = (number, branch.name), plan.actions[index]
                if action.kind is Kind.COMPUTE:
                    self._compute(place, body, modulate(norm(x), shift, scale))
                elif action.kind is Kind.REFRESH and action.tokens:
                    columns = self._chosen(place, index, action, x)[..., None].expand(-1, -1, x.shape[-1])
                    fresh = body(modulate(norm(x.gather(1, columns)), shift, scale))
                    self._differences[place][0].scatter_(1, columns, fresh.to(x.dtype))
                elif action.kind is Kind.REFRESH:
                    self._ages[place] += 1
                x = x + gate[:, None] * self._feature(place, action)
        if number == len(self._blocks) - 1:
            x = self._hidden = self._hidden if plan.skip else x
        return x

    def _compute(self, place: Place, body: Block, h: Tensor) -> None:
        if place[1] == "attn" and self._score and self._score.taken:
            feature, self._taken[place[0]] = attention_and_score(body, h, self._score)
        else:
            feature = body(h)
        found = [feature]
        for older in self._differences.get(place, [])[: self._schedule.history - 1] if self.step else []:
            found.append((found[-1] - older) / (self.step - self._updated[place]))
        self._differences[place], self._updated[place] = found, self.step
        if self._selection:
            self._ages[place] = torch.zeros(h.shape[:2], dtype=torch.int32, device=h.device)

    def _feature(self, place: Place, action: Action) -> Tensor:
        if action.kind is not Kind.FORECAST:
            return self._differences[place][0]
        distance, total = self.step - self._updated[place], 0
        for order, difference in enumerate(self._differences[place][: action.order + 1]):
            total = total + (1 / math.factorial(order)) * difference * distance**order
        return total

    def _draw(self, plan: StepPlan, x: Tensor, c: Tensor) -> None:
        """Random scores of all layers at once: the same for both halves of a guided batch alone."""
        refreshes = any(action.kind is Kind.REFRESH for action in plan.actions)
        if self._score not in (Score.RANDOM, Score.COMPRESS) or plan.skip or not refreshes:
            return
        rows, half, seed = sorted(self._schedule.refreshed), len(x) // 2, self._selection.seed
        if self._generators is None:
            self._generators = tuple(torch.Generator().manual_seed(number) for number in (seed, seed + 1))
        first, second = (
            torch.rand(len(rows), size, x.shape[1], generator=generator)
            for size, generator in zip((len(x) - half, half), self._generators, strict=True)
        )
        guided = len(x) == 2 * half and x[:half].equal(x[half:]) and not c[:half].equal(c[half:])
        drawn = torch.cat([first, first if guided else second], 1).to(x.device)
        self._drawn = dict(zip(rows, drawn, strict=True))

    def _chosen(self, place: Place, index: int, action: Action, x: Tensor) -> Tensor:
        kind, taken = self._score, self._taken.get(place[0])
        if kind in (Score.ATTENTION, Score.KV_NORM):
            summed = taken if kind is Score.ATTENTION else 1 - taken
            base = summed.sum(1, dtype=torch.promote_types(taken.dtype, torch.float32))
        elif kind is Score.SIMILARITY:
            base = 1 - F.cosine_similarity(x, self._differences[place][0], dim=-1)
        elif kind is Score.NORM:
            base = x.norm(dim=-1)
        elif kind is Score.STRAIGHT:
            base = torch.ones_like(x[..., 0])
        else:
            base = self._drawn[index]
        if kind is Score.COMPRESS:
            received = taken.sum(1)
            base = 0.5 * base + 0.5 * received / received.amax(-1, keepdim=True)
        if kind not in (Score.RANDOM, Score.COMPRESS, Score.STRAIGHT):
            base = F.normalize(base, dim=-1)
        return choose(base, self._ages[place], action.tokens, self._selection, self._schedule.fields)


def attention_and_score(attention: Attention, h: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """(output, what scores come from): the map's mean over heads, or the values' norms."""
    batch, tokens, channels = h.shape
    heads = attention.num_heads
    qkv = attention.qkv(h).view(batch, tokens, 3, heads, channels // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if score is Score.KV_NORM:
        attended, taken = F.scaled_dot_product_attention(q, k, v), v.norm(dim=-1)
    else:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        attended, taken = weights @ v, weights.mean(1)
    return attention.proj(attended.transpose(1, 2).reshape(batch, tokens, channels)), taken


def choose(score: Tensor, ages: Tensor, tokens: int, selection: Selection, fields: dict) -> Tensor:
    """[B, K] int64, in order of score [B, N]; the ages [B, N] are written. All of this for every block."""
    if selection.age_weight:
        weight = fields.get("soft_fresh_weight", selection.age_weight)
        score = score + weight * ages / fields.get("fresh_threshold", 1)
    if selection.cell:
        score = with_bonus(score, selection.cell, selection.bonus)
    chosen = score.argsort(dim=-1, descending=True, stable=True)[:, :tokens]
    ages.add_(1).scatter_(1, chosen, 0)
    return chosen


def with_bonus(score: Tensor, cell: int, bonus: float) -> Tensor:
    """[B, N] in which the best token of every cell x cell square has gained bonus times its own score."""
    batch, tokens = score.shape
    lines = math.isqrt(tokens) // cell
    cells = score.view(batch, lines, cell, lines, cell).permute(0, 1, 3, 2, 4)
    cells = cells.reshape(batch, lines * lines, cell * cell)
    best, where = cells.max(dim=-1, keepdim=True)
    cells = cells + torch.zeros_like(cells).scatter_(-1, where, bonus * best)
    return cells.view(batch, lines, lines, cell, cell).permute(0, 1, 3, 2, 4).reshape(batch, tokens)
