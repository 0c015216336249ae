"""Reference hosts with the original families' state-dict keys, for benchmarks, tests and the demo."""

from fastcache.models.dit import PRESETS, DiT, DiTConfig

__all__ = ["PRESETS", "DiT", "DiTConfig"]
