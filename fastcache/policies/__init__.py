"""Caching methods, one file each: settings in, a plan out."""
from fastcache.policies.base import Policy
from fastcache.policies.duca import DuCa
from fastcache.policies.fora import FORA
from fastcache.policies.toca import ToCa

POLICIES: dict[str, type[Policy]] = {
    "fora": FORA,
    "toca": ToCa,
    "duca": DuCa,
}

__all__ = ["FORA", "POLICIES", "DuCa", "Policy", "ToCa"]
