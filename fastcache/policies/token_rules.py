"""What ToCa and DuCa do on a host family: everything about them that is not a setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from fastcache.plan.layout import Layout
from fastcache.policies.fresh_ratio import FreshRatio
from fastcache.policies.token_steps import Cycle


@dataclass(frozen=True)
class TokenRules:
    """The rules of one method on one host family.

    branches: the names that every block has; `refreshed` are those whose tokens a partial step
    refreshes, the others are reused. cell, bonus: spatial bonus of the selection. blocks_per_layer:
    blocks that share a layer number in the ratio schedules. local: the full steps that the original
    runs under force_fresh "local", None where it cannot run.
    """

    branches: tuple[str, ...]
    refreshed: frozenset[str]
    cycle: Cycle
    ratios: Mapping[str, FreshRatio]
    cell: int = 0
    bonus: float = 0.0
    blocks_per_layer: int = 1
    local: Literal["as global", "first only"] | None = None

    def check(self, layout: Layout) -> None:
        """ValueError if the layout is not of the form that the rules are about."""
        every = [(block, name) for block in range(layout.depth) for name in self.branches]
        if [(branch.block, branch.name) for branch in layout.branches] != every:
            raise ValueError(
                f"layout: the rules for {layout.family} are about blocks with branches"
                f" {', '.join(self.branches)}, got branches {', '.join(layout.names)} in {layout.depth}"
                " blocks"
            )
        if layout.depth % self.blocks_per_layer:
            raise ValueError(
                f"layout: {layout.family} has {self.blocks_per_layer} blocks a layer, expected a multiple of"
                f" that, got {layout.depth} blocks"
            )
        if layout.tokens < 1:
            raise ValueError(
                "layout.tokens: expected the number of tokens of a sample, of which a share is refreshed,"
                f" got {layout.tokens}"
            )
        side = isqrt(layout.tokens)
        if self.cell and (side * side != layout.tokens or side % self.cell):
            raise ValueError(
                f"layout.tokens: the spatial bonus on {layout.family} needs a square grid whose side is a"
                f" multiple of {self.cell}, got {layout.tokens} tokens"
            )
