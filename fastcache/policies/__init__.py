"""Caching methods, one file each: settings in, a plan out."""
from fastcache.policies.base import Policy
from fastcache.policies.fora import FORA
from fastcache.policies.l2c import L2C
from fastcache.policies.smoothcache import SmoothCache
from fastcache.policies.taylorseer import TaylorSeer

POLICIES: dict[str, type[Policy]] = {"fora": FORA, "l2c": L2C, "smoothcache": SmoothCache, "taylorseer": TaylorSeer}

__all__ = ["FORA", "L2C", "POLICIES", "Policy", "SmoothCache", "TaylorSeer"]
