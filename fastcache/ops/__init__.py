"""The operators, as functions with checks, documentation and a backend choice; no arithmetic."""

from fastcache.ops.residual import Norm, ResidualUpdate, residual_update, residual_update_scatter_
from fastcache.ops.slots import SlotMap, slot_map
from fastcache.ops.tokens import (
    TokenChoice,
    attention_received,
    relative_error,
    row_score,
    select_tokens_,
    value_norm,
)

__all__ = [
    "Norm",
    "ResidualUpdate",
    "SlotMap",
    "TokenChoice",
    "attention_received",
    "relative_error",
    "residual_update",
    "residual_update_scatter_",
    "row_score",
    "select_tokens_",
    "slot_map",
    "value_norm",
]
