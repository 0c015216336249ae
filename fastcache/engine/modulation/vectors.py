"""Shifts, scales and gates of one block at one step, however they came about."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastcache.hosts import HostBranch


class BlockVectors(Protocol):
    """What the branches of a block ask for."""

    def vector(self, row: int | None) -> Tensor | None:
        """Shift or scale [B, D] number `row` of the block's modulation; None for None."""

    def gate(self, position: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        """(gate, row) of the branch at `position` in its block, as ResidualStream.add takes it."""


@dataclass(frozen=True)
class HostVectors:
    """All vectors [B, V, D] of the block, by the host's own module."""

    every: Tensor

    def vector(self, row: int | None) -> Tensor | None:
        return None if row is None else self.every[:, row]

    def gate(self, position: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        return (None if branch.gate is None else self.every[:, branch.gate]), None


@dataclass(frozen=True)
class OnlyGates:
    """A gate [B, D] for every branch of the block, where no body runs."""

    gates: list[Tensor | None]

    def vector(self, row: int | None) -> Tensor | None:
        raise AssertionError("a branch whose body runs needs its shift and scale")

    def gate(self, position: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        return self.gates[position], None


@dataclass(frozen=True)
class BankedGates:
    """Gates of all blocks [L * G, B, D], of which those of this block begin at row `first`.

    held: numbers of the vectors that the bank has of each block. running: vectors [B, V', D] from
    number `start` on, for the bodies of the block that run; None where none does.
    """

    bank: Tensor
    first: int
    held: tuple[int, ...]
    running: Tensor | None = None
    start: int = 0

    def vector(self, row: int | None) -> Tensor | None:
        return None if row is None or self.running is None else self.running[:, row - self.start]

    def gate(self, position: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        return (None, None) if branch.gate is None else (self.bank, self.first + self.held.index(branch.gate))


@dataclass(frozen=True)
class TableRows:
    """The announced vectors of a step [L * V, B, D], of which those of this block begin at row `first`."""

    rows: Tensor
    first: int

    def vector(self, row: int | None) -> Tensor | None:
        return None if row is None else self.rows[self.first + row]

    def gate(self, position: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        return (None, None) if branch.gate is None else (self.rows, self.first + branch.gate)
