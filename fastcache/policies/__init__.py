"""Caching methods, one file each: settings in, a plan out."""
from fastcache.policies.base import Policy
from fastcache.policies.fora import FORA

POLICIES: dict[str, type[Policy]] = {"fora": FORA}

__all__ = ["FORA", "POLICIES", "Policy"]
