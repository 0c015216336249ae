"""The residual stream operators: add pending features, and prepare the next body's input."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastcache import backends
from fastcache.backends.library import refuse_grad


class Norm(enum.IntEnum):
    """What happens to the updated stream before it is modulated; NONE means no modulated output."""

    NONE = 0
    LAYER = 1
    RMS = 2
    IDENTITY = 3


class ResidualUpdate(NamedTuple):
    """Outputs of one launch; what was not asked for is None.

    x: [B, N, D] updated stream. h: [B, N, D], or [B, K, D] packed rows. errors: [B, 3] float32.
    """

    x: Tensor | None
    h: Tensor | None
    errors: Tensor | None


def residual_update(
    x: Tensor,
    features: Tensor | Sequence[Tensor],
    gates: Tensor | None = None,
    *,
    gate_index: Tensor | None = None,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    norm: Norm = Norm.NONE,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    row_slots: Tensor | None = None,
    row_count: int = 0,
    reference: Tensor | None = None,
    need_x: bool = True,
) -> ResidualUpdate:
    """x' = x + sum_j weights[j] * gate_j * features[j], then h = norm(x') * (1 + scale) + shift.

    One pass over memory, fp32 accumulation in term order, one rounding. Inputs are not modified.

    Args:
        x: [B, N, D] float32, float16 or bfloat16 (float64 in eager), unit stride in D.
        features: one or up to 1,024 tensors [B, N, D] of one dtype (float8_e4m3fn with `scales`).
        gates: one vector for all terms ([D], [B, D], [B, 1, D], [B, F, D] per frame or [B, N, D]
            per token, any strides but 1 in D), or packed [G, *vector] with `gate_index`.
        gate_index: [J] int32, row of `gates` per term, -1 = no gate. Bad rows: see below.
        weights: [J] float32, a factor per term (forecasts).
        scales: [J, B, N] float32, row scales of compressed features.
        norm, eps: Norm.LAYER, RMS or IDENTITY asks for h.
        shift, scale: vectors; norm_weight, norm_bias: [D], the affine part of the norm.
        row_slots, row_count: [B, N] int32 slot map; h then holds only those rows, [B, K, D].
        reference: [B, N, D]; asks for errors = sum|F - R|, sum|F|, sum|R| of the last feature.
        need_x: False if only h or errors are wanted.

    Raises ValueError, TypeError, IndexError or RuntimeError naming the argument; RuntimeError if
    an input requires grad in grad mode. A GPU cannot raise for an index out of range: a gate that does
    not exist counts as NaN, a slot that does not exist as -1, memory outside is never touched, and
    `fastcache.backends.take_index_errors(device)` names the argument.
    Source: adaLN-Zero blocks (DiT) and their caching methods.
    """
    features = [features] if isinstance(features, Tensor) else list(features)
    args = (
        x,
        features,
        gates,
        gate_index,
        weights,
        scales,
        int(norm),
        shift,
        scale,
        norm_weight,
        norm_bias,
        eps,
        row_slots,
        row_count,
        reference,
        need_x,
    )
    if torch.compiler.is_compiling():
        outputs = backends.traced(x.dtype).residual_update(*args)
    else:
        if torch.is_grad_enabled():
            refuse_grad(
                (x, *features, gates, weights, scales, shift, scale, norm_weight, norm_bias, reference)
            )
        outputs = backends.choose(x.device, x.dtype).residual_update(*args)
    return _named(outputs, norm, reference, need_x)


def residual_update_scatter_(
    x: Tensor,
    slot: Tensor,
    fresh: Tensor,
    fresh_slots: Tensor | None = None,
    features: Tensor | Sequence[Tensor] = (),
    *,
    position: int = -1,
    slot_scale: Tensor | None = None,
    gates: Tensor | None = None,
    gate_index: Tensor | None = None,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    norm: Norm = Norm.NONE,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    row_slots: Tensor | None = None,
    row_count: int = 0,
    reference: Tensor | None = None,
    need_x: bool = True,
) -> ResidualUpdate:
    """`residual_update` in which one term is an owned slot that first takes fresh rows, in place.

    slot [B, N, D] is the only feature tensor that is written: token n takes
    fresh[b, fresh_slots[b, n]] where fresh_slots [B, N] int32 is >= 0 and keeps its row elsewhere;
    without a map every row is stored (fresh [B, N, D]). The slot is term number `position`
    (-1 = last) and is added with its gate as the others are. A float8 slot also writes its row
    scales, slot_scale [B, N] float32. gate_index, weights and scales count the slot's term.
    All other arguments, outputs and errors as in `residual_update`.
    """
    features = [features] if isinstance(features, Tensor) else list(features)
    args = (
        x,
        slot,
        fresh,
        fresh_slots,
        features,
        position,
        slot_scale,
        gates,
        gate_index,
        weights,
        scales,
        int(norm),
        shift,
        scale,
        norm_weight,
        norm_bias,
        eps,
        row_slots,
        row_count,
        reference,
        need_x,
    )
    if torch.compiler.is_compiling():
        outputs = backends.traced(x.dtype).residual_update_scatter_(*args)
    else:
        if torch.is_grad_enabled():
            refuse_grad(
                (
                    x,
                    slot,
                    fresh,
                    *features,
                    gates,
                    weights,
                    scales,
                    shift,
                    scale,
                    norm_weight,
                    norm_bias,
                    reference,
                )
            )
        outputs = backends.choose(x.device, x.dtype).residual_update_scatter_(*args)
    return _named(outputs, norm, reference, need_x)


def _named(
    outputs: tuple[Tensor, Tensor, Tensor], norm: int, reference: Tensor | None, need_x: bool
) -> ResidualUpdate:
    x, h, errors = outputs
    return ResidualUpdate(x if need_x else None, h if norm else None, None if reference is None else errors)
