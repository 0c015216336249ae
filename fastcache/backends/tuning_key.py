"""What calls must have in common to share a launch configuration."""

from dataclasses import dataclass

KERNELS = ("triton.sum", "triton.row", "cuda.sum", "cuda.row")
DTYPES = ("float32", "float16", "bfloat16")
MOST_TERMS = (2, 16, 64, 1024)


@dataclass(frozen=True)
class Key:
    """Calls that share a configuration. terms, rows: buckets."""

    kernel: str
    device: str
    channels: int
    dtype: str
    terms: int
    rows: int

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, most in (("channels", 1 << 31), ("terms", len(MOST_TERMS) - 1), ("rows", 16)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected 0..{most}, got {getattr(self, name)}")


def term_bucket(features: int) -> int:
    """0 for up to 2 features, 1 for up to 16, 2 for up to 64, 3 for more."""
    return next(bucket for bucket, most in enumerate(MOST_TERMS) if features <= most)


def row_bucket(rows: int) -> int:
    """The smallest k with rows <= 4^k."""
    return (max(rows, 1) - 1).bit_length() + 1 >> 1
