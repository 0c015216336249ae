"""Slot maps: which tokens a packed block of rows belongs to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.backends.index_flags import error_flag

BAD_INDEX = 8  # bit of the sticky flag


@dataclass(frozen=True)
class SlotMap:
    """Selected tokens of every sample, in the two forms that kernels need.

    slots: [B, N] int32, row of the packed block per token, -1 = not selected.
    count: K, rows of the packed block (some may be padding).
    """

    slots: Tensor
    count: int


def slot_map(index: Tensor, tokens: int) -> SlotMap:
    """Slot map of token indices [B, K] (int32 or int64; -1 pads), for N = `tokens`.

    Row k of a packed block belongs to token index[b, k]. Raises ValueError for a bad shape or
    dtype. An index outside -1..N-1, or one that is named twice in a sample, raises IndexError on a
    CPU; on a GPU, where reading it would wait, it is left out or one of the two is taken, and
    the sticky flag is set, which a session reads when it closes (backends.take_index_errors).
    """
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index: expected [B, K] int32 or int64, got {list(index.shape)} {index.dtype}")
    B, K = index.shape
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= tokens:
            raise IndexError(f"index: expected tokens in -1..{tokens - 1}, got {low}..{high}")
        ordered = index.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise IndexError("index: a token is named twice in one sample")
    named = (index >= 0) & (index < tokens)
    slots = torch.full((B, tokens + 1), -1, dtype=torch.int32, device=index.device)
    rows = torch.arange(K, dtype=torch.int32, device=index.device).expand(B, K)
    slots.scatter_(1, torch.where(named, index, tokens).long(), rows)
    found = SlotMap(slots[:, :tokens].contiguous(), K)
    if index.device.type != "cpu" and not torch.compiler.is_compiling():
        flag_bad_index(index, named, found, error_flag(index.device))
    return found


def flag_bad_index(index: Tensor, named: Tensor, found: SlotMap, flag: Tensor) -> None:
    """Set a bit of `flag` [1], on the device, if an index is out of range or a token is named twice."""
    outside = ((index != -1) & ~named).any()
    twice = (found.slots >= 0).sum() != named.sum()
    flag.bitwise_or_((outside | twice).to(torch.int32) * BAD_INDEX)
