"""Reference hosts with the original families' state-dict keys, for benchmarks, tests and the demo."""

from fastcache.models.dit import DiT, DiTConfig, PRESETS

__all__ = ["DiT", "DiTConfig", "PRESETS"]
