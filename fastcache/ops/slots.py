"""Slot maps: which tokens a packed block of rows belongs to."""
from dataclasses import dataclass

import torch
from torch import Tensor


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
    dtype, IndexError for an index outside -1..N-1 or one that is named twice in a sample (CPU).
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
    slots = torch.full((B, tokens + 1), -1, dtype=torch.int32, device=index.device)
    rows = torch.arange(K, dtype=torch.int32, device=index.device).expand(B, K)
    slots.scatter_(1, torch.where(index >= 0, index, tokens).long(), rows)
    return SlotMap(slots[:, :tokens].contiguous(), K)
