"""The sizes of DiT models: the arguments of one, and those of the published ones."""

from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class DiTConfig:
    """The arguments of a `DiT`. `input_size` is the side in latent pixels, `patch_size` in the same unit."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "num_classes",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name}: expected a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not isinstance(self.mlp_ratio, Real) or not 0 < self.mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio: expected a number > 0, got {self.mlp_ratio!r}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size: expected a multiple of patch_size {self.patch_size}, got {self.input_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size {self.hidden_size}, got {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size: expected a multiple of 4 (sin and cos of two axes), got {self.hidden_size}"
            )

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of the output: the prediction, and as many for the variance with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class Preset:
    """The size of a published model: blocks, channels, heads, and the side of a patch."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int


PRESETS: dict[str, Preset] = {
    f"DiT-{size}/{patch_size}": Preset(depth, hidden_size, num_heads, patch_size)
    for size, depth, hidden_size, num_heads in (
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("XL", 28, 1152, 16),
    )
    for patch_size in (2, 4, 8)
}
