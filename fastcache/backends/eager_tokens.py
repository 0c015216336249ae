"""The definition of the operators that score and choose tokens, and of the calibration error.

As in eager.py: plain PyTorch, float64 inputs in float64, all others in float32, nothing is read
back to the host. csrc/schema.def has every argument.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.backends import token_checks as checks

CHUNK_LOGITS = 1 << 22  # logits of one chunk of queries: 16 MB in float32
SMALLEST_NORM, SMALLEST_COSINE_NORM = 1e-12, 1e-8


def select_tokens_(
    score: Tensor,
    age: Tensor,
    counts: Tensor,
    capacity: int,
    age_weight: float = 0.0,
    normalize: bool = True,
    width: int = 0,
    cell: int = 0,
    bonus: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The counts[r] best tokens of every row by score, age and spatial bonus.

    Method: docs/methods/toca.md, "Which tokens".

    Writes age [R, N]; returns (slots [R, N], index [R, capacity]), fresh int32 tensors. Only the set
    matters to a refresh, so chosen tokens are in ascending order.
    """
    checks.select_tokens(score, age, counts, capacity, width, cell, bonus)
    R, N = score.shape
    total = score
    if normalize:
        norm = torch.linalg.vector_norm(score, dim=1, keepdim=True, dtype=torch.float64).clamp(
            min=SMALLEST_NORM
        )
        total = total / norm.to(score.dtype)
    if age_weight:
        total = total + age_weight * age.to(score.dtype)
    if cell and N and R:
        total = with_cell_bonus(total, width, cell, bonus)
    order = total.sort(dim=1, descending=True, stable=True).indices  # NaN first, equal scores by index
    counts = counts.clamp(min=0, max=min(N, capacity))
    wanted = torch.arange(N, device=score.device) < counts[:, None]
    chosen = torch.zeros(R, N, dtype=torch.bool, device=score.device).scatter_(1, order, wanted)
    slots = torch.where(chosen, chosen.cumsum(1) - 1, -1)
    index = torch.full((R, capacity + 1), -1, dtype=torch.int32, device=score.device)
    tokens = torch.arange(N, dtype=torch.int32, device=score.device).expand(R, N)
    index.scatter_(1, torch.where(chosen, slots, capacity), torch.where(chosen, tokens, -1))
    age.copy_(torch.where(chosen, 0, age + 1))
    return slots.int(), index[:, :capacity].contiguous()


def with_cell_bonus(score: Tensor, width: int, cell: int, bonus: float) -> Tensor:
    """Scores [R, N] in which the best token of every cell x cell square has gained bonus times its own."""
    R, N = score.shape
    lines, columns = N // width // cell, width // cell
    cells = score.view(R, lines, cell, columns, cell).transpose(2, 3).reshape(R, lines * columns, cell * cell)
    best = cells.argmax(-1, keepdim=True)  # NaN is the largest, the first of equal ones
    value = cells.gather(-1, best)
    cells = cells.scatter(-1, best, value + bonus * value)
    return cells.view(R, lines, columns, cell, cell).transpose(2, 3).reshape(R, N)


def row_score(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """[B, N]: ||x|| per token, or 1 - cos(x, reference). ToCa's scores `norm` and `similarity`."""
    checks.row_score(x, reference)
    x = _widened(x)
    if reference is None:
        return torch.linalg.vector_norm(x, dim=-1)
    reference = reference.to(x.dtype)
    norms = [
        torch.linalg.vector_norm(rows, dim=-1).clamp(min=SMALLEST_COSINE_NORM) for rows in (x, reference)
    ]
    return 1 - (x * reference).sum(-1) / (norms[0] * norms[1])


def value_norm(v: Tensor) -> Tensor:
    """[B, N]: sum over heads of 1 - ||v||, v [B, H, N, d]. The score `kv-norm` of ToCa and DuCa."""
    checks.value_norm(v)
    return (1 - torch.linalg.vector_norm(_widened(v), dim=-1)).sum(1)


def attention_received(q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    """[B, M]: column sums of the head-mean of softmax(scale * q k^T), a chunk of queries at a time.

    q [B, H, N, d], k [B, H, M, d]; lse [B, H, N] saves the softmax its own sum; scale is d^-1/2 if
    None. ToCa's score `attention`: how much a token is looked at.
    """
    checks.attention_received(q, k, lse)
    q, k = _widened(q), _widened(k)
    B, H, N, d = q.shape
    scale = d**-0.5 if scale is None else scale
    received = q.new_zeros(B, k.shape[2])
    rows = max(1, CHUNK_LOGITS // max(1, B * H * k.shape[2]))
    for start in range(0, N, rows):
        logits = torch.matmul(q[:, :, start : start + rows] * scale, k.transpose(-1, -2))
        if lse is None:
            weights = logits.softmax(-1)
        else:
            weights = logits.sub_(lse[:, :, start : start + rows, None]).exp_()
        received += weights.sum((1, 2))
    return received / max(1, H)


def relative_error(newest: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
    """[K, L]: sum|earlier - newest| / sum|newest| over whole tensors (SmoothCache,
    docs/methods/smoothcache.md, "Calibration").
    """
    checks.relative_error(newest, earlier)
    L = len(newest)
    wide = [_widened(feature) for feature in newest]
    sizes = torch.stack([feature.abs().sum(dtype=torch.float64) for feature in wide])
    if not earlier:
        return wide[0].new_zeros(0, L)
    sums = torch.stack(
        [
            (other.to(wide[j % L].dtype) - wide[j % L]).abs().sum(dtype=torch.float64)
            for j, other in enumerate(earlier)
        ]
    )
    return (sums.view(-1, L) / sizes).to(wide[0].dtype)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
