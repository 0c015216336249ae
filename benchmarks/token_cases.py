"""What the part `tokens` measures: a partial block, and the choice of tokens for all layers of a step.

Nothing here knows a device or a clock.
"""

import enum
from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPE_NAMES

MLP_RATIO = 4
LAYERS = 28  # of a step's choice


class Work(str, enum.Enum):
    """How much of a partial block is timed."""

    STREAM = "stream"
    BLOCK = "block"

    @property
    def meaning(self) -> str:
        """What is computed, in one line."""
        return {
            Work.STREAM: "slot takes K fresh rows, x' = x + g * slot + g' * attention, h = LayerNorm(x') * (1 + scale) + shift of K other rows",
            Work.BLOCK: "the same, and the MLP on the K rows of h",
        }[self]


@dataclass(frozen=True)
class TokenSize:
    """x is [batch, tokens, channels]; tokens is a square of an even side, as the spatial bonus needs it."""

    name: str
    batch: int
    tokens: int
    channels: int = 1152

    @property
    def slug(self) -> str:
        """The name for test ids: `n256-b2`."""
        return self.name.lower().replace(" ", "-")


SIZES = (
    TokenSize("N256 B2", 2, 256),
    TokenSize("N1024 B2", 2, 1024),
    TokenSize("N4096 B2", 2, 4096),
    TokenSize("N24336 B1", 1, 24336),
)
SHARES = (0.01, 0.07, 0.25, 0.6)
TINY = TokenSize("Tiny B2", 2, 16, 32)


@dataclass(frozen=True)
class BlockCase:
    """A partial block that refreshes K = share of the tokens, in one dtype."""

    work: Work
    size: TokenSize
    share: float
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """`block-n256-b2-7pc-fp32`."""
        return f"{self.work.value}-{self.size.slug}-{100 * self.share:.0f}pc-{DTYPE_NAMES[self.dtype]}"

    @property
    def rows(self) -> int:
        """K, tokens per sample."""
        return max(1, int(self.share * self.size.tokens))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the MLP's weights and biases."""
        return (
            (2 * MLP_RATIO * self.size.channels + MLP_RATIO + 1) * self.size.channels
        ) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the MLP, 2 per multiply-add; 0 for the stream alone."""
        return (
            4 * MLP_RATIO * self.size.batch * self.rows * self.size.channels**2
            if self.work is Work.BLOCK
            else 0
        )

    @property
    def tensor_bytes(self) -> int:
        """U, bytes of one tensor [B, N, D]."""
        return self.size.batch * self.size.tokens * self.size.channels * self.dtype.itemsize

    @property
    def min_bytes(self) -> int:
        """Least bytes that any implementation reads and writes, each operand once.

        U = B N D e, V = B D e, r = K / N: 4 U for x, attention, slot or fresh rows, and x'; r U for
        the rows that the slot takes, r U for h (or, with the MLP, for what it makes of h); 4 V for
        two gates, shift and scale; 8 B N for two slot maps; with the MLP its weights.
        """
        size, width = self.size, self.dtype.itemsize
        rows = 2 * size.batch * self.rows * size.channels * width
        total = (
            4 * self.tensor_bytes
            + rows
            + 4 * size.batch * size.channels * width
            + 8 * size.batch * size.tokens
        )
        return total + (self.weight_bytes if self.work is Work.BLOCK else 0)


@dataclass(frozen=True)
class ChoiceCase:
    """Choosing tokens for every layer of a step, K growing over layers as in ToCa's `ToCa-ddim50`."""

    size: TokenSize
    share: float
    layers: int = LAYERS

    @property
    def name(self) -> str:
        """`choice-n256-b2-7pc`."""
        return f"choice-{self.size.slug}-{100 * self.share:.0f}pc"

    @property
    def counts(self) -> list[int]:
        """K of every layer."""
        last = max(1, self.layers - 1)
        return [
            min(self.size.tokens, max(1, int(self.share * (0.8 + 0.4 * layer / last) * self.size.tokens)))
            for layer in range(self.layers)
        ]

    @property
    def min_bytes(self) -> int:
        """A score and an age read, an age and a slot written, 4 bytes each, for every token of every layer."""
        return 16 * self.layers * self.size.batch * self.size.tokens


def block_cases(
    sizes: tuple[TokenSize, ...] = SIZES,
    shares: tuple[float, ...] = SHARES,
    dtype: torch.dtype = torch.float32,
) -> list[BlockCase]:
    """Small before large; at each size the stream alone first."""
    return [BlockCase(work, size, share, dtype) for size in sizes for work in Work for share in shares]


def choice_cases(sizes: tuple[TokenSize, ...] = SIZES, share: float = 0.175) -> list[ChoiceCase]:
    """One a size. share: what fresh_ratio=0.07 comes to in the middle of `ToCa-ddim50`, 0.07 * 2.5 * (3 - 4 / 2)."""
    return [ChoiceCase(size, share) for size in sizes]
