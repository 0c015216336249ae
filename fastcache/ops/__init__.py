"""The operators, as functions with checks, documentation and a backend choice; no arithmetic."""
from fastcache.ops.residual import Norm, ResidualUpdate, residual_update, residual_update_scatter_
from fastcache.ops.slots import SlotMap, slot_map

__all__ = ["Norm", "ResidualUpdate", "SlotMap", "residual_update", "residual_update_scatter_", "slot_map"]
