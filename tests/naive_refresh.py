"""The method written naively, for tests: a plan of any kind over a small DiT, block by block.

Materialised attention maps, a sort per layer, gather and scatter: what the specification says and
nothing of the engine but the plan itself.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.forecast import forecast_weights
from fastcache.models import DiT
from fastcache.schedule import Kind, Schedule, Score
from hosts import inputs


@torch.no_grad()
def run_naively(
    model: DiT, schedule: Schedule, batch: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Outputs of every step."""
    model = copy.deepcopy(model).to(dtype)
    stored: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
    scores, ages, hidden, outputs = {}, {}, None, []
    generator = torch.Generator().manual_seed(schedule.selection.seed if schedule.selection else 0)
    for step, plan in enumerate(schedule.steps):
        x, t, y = inputs(step, batch)
        x, t = x.to(dtype), t.to(dtype)
        x = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        rows = sorted(schedule.refreshed)
        drawn = None
        if (
            any(action.kind is Kind.REFRESH for action in plan.actions)
            and not plan.skip
            and schedule.selection.score in (Score.RANDOM, Score.COMPRESS)
        ):
            drawn = torch.rand(len(rows), batch // 2, x.shape[1], generator=generator).repeat(1, 2, 1)
        for number, block in enumerate(model.blocks):
            if plan.skip and number not in plan.run_blocks:
                continue
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
            for index, branch in schedule.layout.branches_of(number):
                name = branch.name
                body, norm, shift, scale, gate = (
                    (block.attn, block.norm1, shift1, scale1, gate1)
                    if name == "attn"
                    else (block.mlp, block.norm2, shift2, scale2, gate2)
                )
                action, past = plan.actions[index], stored.setdefault((number, name), [])
                if action.kind is Kind.COMPUTE:
                    h = norm(x) * (1 + scale) + shift
                    past.insert(0, (step, body(h)))
                    ages[number, name] = torch.zeros(x.shape[:2])
                    if name == "attn":
                        scores[number] = attention_scores(block.attn, h)
                elif action.kind is Kind.REFRESH:
                    feature = past[0][1]
                    score = total_score(
                        schedule,
                        scores.get(number),
                        ages[number, name],
                        x,
                        feature,
                        None if drawn is None else drawn[rows.index(index)],
                    )
                    chosen = score.argsort(dim=1, descending=True, stable=True)[:, : action.tokens]
                    ages[number, name] = (ages[number, name] + 1).scatter(1, chosen, 0.0)
                    picked = chosen[..., None].expand(-1, -1, x.shape[2])
                    fresh = body(norm(x.gather(1, picked)) * (1 + scale) + shift)
                    past[0] = (past[0][0], feature.scatter(1, picked, fresh))
                if action.kind is Kind.FORECAST:
                    weights = forecast_weights(step, [at for at, _ in past], min(action.order, len(past) - 1))
                    feature = sum(weight * kept for weight, (_, kept) in zip(weights, past))
                else:
                    feature = past[0][1]
                x = x + gate * feature
        if plan.skip:
            x = hidden
        hidden = x
        outputs.append(model._unpatch(model.final_layer(x, c)))
    return outputs


def attention_scores(attention, h: Tensor) -> dict[Score, Tensor]:
    """Received attention and value norms, from the materialised map."""
    B, N, D = h.shape
    q, k, v = attention.qkv(h).view(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return {Score.ATTENTION: weights.mean(1).sum(1), Score.KV_NORM: (1 - v.norm(dim=-1)).sum(1)}


def total_score(
    schedule: Schedule, taken: dict | None, age: Tensor, x: Tensor, feature: Tensor, drawn: Tensor | None
) -> Tensor:
    selection = schedule.selection
    kind = selection.score
    if kind is Score.COMPRESS:
        base = 0.5 * drawn + 0.5 * taken[Score.ATTENTION] / taken[Score.ATTENTION].amax(-1, keepdim=True)
    elif kind is Score.RANDOM:
        base = drawn
    elif kind is Score.STRAIGHT:
        base = torch.ones(x.shape[:2])
    else:
        base = {
            Score.SIMILARITY: lambda: 1 - F.cosine_similarity(x, feature, dim=-1),
            Score.NORM: lambda: x.norm(dim=-1),
        }.get(kind, lambda: taken[kind])()
        base = F.normalize(base, dim=-1)
    total = base + selection.age_weight * age
    if selection.cell:
        side, g = int(x.shape[1] ** 0.5), selection.cell
        for b in range(x.shape[0]):
            grid = total[b].view(side, side)
            for i in range(0, side, g):
                for j in range(0, side, g):
                    cell = grid[i : i + g, j : j + g]
                    at = int(cell.reshape(-1).argmax())
                    cell[at // g, at % g] += selection.bonus * cell[at // g, at % g].clone()
    return total
