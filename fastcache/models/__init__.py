"""Reference hosts with the original families' state-dict keys, for benchmarks, tests and the demo."""

from fastcache.models.config import PRESETS, DiTConfig
from fastcache.models.dit import DiT

__all__ = ["PRESETS", "DiT", "DiTConfig"]
