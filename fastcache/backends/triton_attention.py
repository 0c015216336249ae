"""The launch of attention_received in Triton."""

import torch
import triton
from torch import Tensor

from fastcache.backends import token_checks as checks
from fastcache.backends.triton_config import attention_config, head_split
from fastcache.backends.triton_launch import aligned, current_device
from fastcache.kernels.attention_received import lse_kernel, received_kernel


def attention_received(q: Tensor, k: Tensor, lse: Tensor | None = None, scale: float | None = None) -> Tensor:
    """`fastcache.backends.eager.attention_received`: one pass of q k^T, two without `lse`, and a sum over
    heads.
    """
    checks.attention_received(q, k, lse)
    (B, H, N, d), M = q.shape, k.shape[2]
    partial = torch.empty(B, H, M, dtype=torch.float32, device=q.device)
    if min(B, H, N, M) == 0:
        return partial.zero_().sum(1)
    align, unit = (16, 8) if d % 8 == 0 and aligned(q) and aligned(k) else (1, 1)
    config = attention_config(q.dtype, d, M)
    head, tail = head_split(d)
    strides = [stride // unit for tensor in (q, k) for stride in tensor.stride()[:3]]
    shared = dict(
        D=d,
        HEAD=head,
        TAIL=tail,
        PRECISION="ieee",
        ALIGN=align,
        UNIT=unit,
        KEYS=config.keys,
        QUERIES=config.queries,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    scale = d**-0.5 if scale is None else scale
    with current_device(q.device):
        if lse is None:
            lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
            # its rows are queries, so the two sides of the tile change places
            lse_kernel[(triton.cdiv(N, config.keys), H, B)](
                q, k, lse, N, M, scale, *strides, **{**shared, "QUERIES": config.keys, "KEYS": config.queries}
            )
        received_kernel[(triton.cdiv(M, config.keys), H, B)](
            q, k, lse.contiguous(), partial, N, M, scale, *strides, **shared
        )
    return partial.sum(1) / H
