"""The branches of a host, and what each costs."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch of a host. FLOPs count 2 per multiply-add, for one sample.

    block: index of the block in execution order. name: its name in the host (attn, mlp).
    flops_per_token: matrix-multiply FLOPs per computed token. flops_per_pair: attention FLOPs per
    (computed token, attended token) pair.
    """

    block: int
    name: str
    flops_per_token: int
    flops_per_pair: int = 0

    def flops(self, tokens: int, attended: int) -> int:
        """FLOPs of computing `tokens` tokens of one sample, each attending to `attended`."""
        return tokens * (self.flops_per_token + self.flops_per_pair * attended)


@dataclass(frozen=True)
class Layout:
    """The branches of a host in execution order, with what each costs.

    tokens N per sample; width D; fixed_flops per sample and step outside the blocks (embedders,
    final layer); modulation_flops per sample, step and block (adaLN projections).
    """

    family: str
    tokens: int
    width: int
    heads: int
    branches: tuple[Branch, ...]
    fixed_flops: int = 0
    modulation_flops: int = 0

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max((branch.block for branch in self.branches), default=-1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Branch names in the order in which they first appear."""
        return tuple(dict.fromkeys(branch.name for branch in self.branches))

    def branches_of(self, block: int) -> list[tuple[int, Branch]]:
        """(index in the plan, branch) of one block's branches."""
        return [(index, branch) for index, branch in enumerate(self.branches) if branch.block == block]
