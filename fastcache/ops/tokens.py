"""Operators of token-wise refresh: score tokens, and choose which are recomputed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcache import backends
from fastcache.backends.library import refuse_grad


class TokenChoice(NamedTuple):
    """slots [R, N] int32: row of the packed block or -1. index [R, capacity] int32: chosen tokens, ascending,
    then -1.
    """

    slots: Tensor
    index: Tensor  # type: ignore[assignment]  # and not a tuple's search


def select_tokens_(
    score: Tensor,
    age: Tensor,
    counts: Tensor,
    capacity: int,
    *,
    age_weight: float = 0.0,
    normalize: bool = True,
    width: int = 0,
    cell: int = 0,
    bonus: float = 0.0,
) -> TokenChoice:
    """Choose counts[r] tokens of every row, and update the ages in place, in one launch without a sort.

    Args:
        score: [R, N] float32 base scores; a row is one sample of one layer, so that one call serves
            all layers of a step.
        age: [R, N] int32, written: 0 for chosen tokens, one more for the others.
        counts: [R] int32, tokens to choose, 0 .. min(N, capacity); on the device, so that a
            captured graph may change them. On a GPU they are clamped, on a CPU checked.
        capacity: columns of the index, a host number: the largest count, or a padded one.
        age_weight: added per step of age. normalize: divide scores by their L2 norm over tokens.
        width, cell, bonus: tokens a line of the grid; in each cell x cell square the best token
            gains bonus times its own (aged) score, which lowers a negative one.

    NaN scores are chosen first, equal ones by lowest index. Raises ValueError, TypeError or
    IndexError naming the argument. Source: ToCa (docs/methods/toca.md, "Which tokens").
    """
    args = (score, age, counts, capacity, age_weight, normalize, width, cell, bonus)
    return TokenChoice(*_call("select_tokens_", score, (score,), args))


def row_score(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """||x|| per token, or 1 - cos(x, reference): x, reference [B, N, D] -> [B, N] float32.

    ToCa's scores `norm` and `similarity`. Raises ValueError or TypeError naming the argument.
    """
    return _call("row_score", x, (x, reference), (x, reference))


def value_norm(v: Tensor) -> Tensor:
    """Sum over heads of 1 - ||v||: v [B, H, N, d] (any strides but 1 in d) -> [B, N] float32.

    DuCa's score `kv-norm`: a token of small values is recomputed first.
    """
    return _call("value_norm", v, (v,), (v,))


def attention_received(q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention that every token receives, summed over queries, mean over heads: [B, M] float32.

    q [B, H, N, d], k [B, H, M, d] (any strides but 1 in d); lse [B, H, N]: log-sum-exp of the
    scaled logits, as flash attention returns it, computed here if None; scale: d^-1/2 if None.
    Equals the column sums of the materialised map, and never holds one. ToCa's score `attention`.
    """
    return _call("attention_received", q, (q, k, lse), (q, k, lse, scale))


def relative_error(newest: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
    """sum|earlier - newest| / sum|newest| per layer and look-ahead: [K, L] float32 on the device.

    newest: L features [B, N, D]; earlier: K * L of them, earlier[k * L + l] belongs to newest[l].
    One launch, nothing is read back. Source: SmoothCache's calibration (docs/methods/smoothcache.md,
    "Calibration").
    """
    newest, earlier = list(newest), list(earlier)
    if not newest:
        raise ValueError("newest: expected at least one feature, got none")
    return _call("relative_error", newest[0], (*newest, *earlier), (newest, earlier))


def _call(operator: str, x: Tensor, inputs: Sequence[Tensor | None], args: tuple[object, ...]) -> Any:
    if torch.compiler.is_compiling():
        return getattr(backends.traced(x.dtype), operator)(*args)
    if torch.is_grad_enabled():
        refuse_grad(inputs)
    return getattr(backends.choose(x.device, x.dtype, operator), operator)(*args)
