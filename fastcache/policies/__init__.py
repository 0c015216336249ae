"""Caching methods, one file each: settings in, a plan out."""

from fastcache.policies.base import Policy
from fastcache.policies.duca import DuCa
from fastcache.policies.fora import FORA
from fastcache.policies.l2c import L2C
from fastcache.policies.smoothcache import SmoothCache
from fastcache.policies.taylorseer import TaylorSeer
from fastcache.policies.toca import ToCa

POLICIES: dict[str, type[Policy]] = {
    "fora": FORA,
    "toca": ToCa,
    "duca": DuCa,
    "smoothcache": SmoothCache,
    "l2c": L2C,
    "taylorseer": TaylorSeer,
}

__all__ = ["FORA", "L2C", "POLICIES", "DuCa", "Policy", "SmoothCache", "TaylorSeer", "ToCa"]
