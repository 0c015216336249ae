"""One pass through a host's blocks by a step's plan: the way of a call below the session."""
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from fastcache.deferred import Deferred
from fastcache.features import FeatureStore
from fastcache.hosts import Host, HostBranch
from fastcache.modulation import ModulationTable
from fastcache.schedule import Kind, StepPlan, full_step
from fastcache.stream import ResidualStream

TRUNK = -1  # feature index of the trunk's output, kept for skipped steps


@dataclass(frozen=True)
class Vectors:
    """Modulation of one block: [B, V, D] of the host, gates alone, or a row range of the table."""

    every: Tensor | None = None
    gates: list[Tensor | None] | None = None
    table: Tensor | None = None
    first: int = 0

    def vector(self, row: int | None) -> Tensor | None:
        """Shift or scale vector [B, D]."""
        if row is None:
            return None
        return self.every[:, row] if self.table is None else self.table[self.first + row]

    def gate(self, number: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        """(gate, row) of a branch as ResidualStream.add takes it."""
        if branch.gate is None:
            return None, None
        if self.table is not None:
            return self.table, self.first + branch.gate
        return (self.gates[number] if self.every is None else self.every[:, branch.gate]), None


@dataclass(frozen=True)
class Done:
    """What a call turned out to be: its step kind, and whether a cached step had to be recomputed."""

    kind: str
    recomputed: bool


class Trunk:
    """Runs blocks branch by branch over a ResidualStream, storing and reusing features."""

    def __init__(self, host: Host, *, own_features: bool, compile: bool) -> None:
        self._host = host
        self._own = own_features
        self._blocks = host.blocks
        self._layout = host.layout()
        self._programs = [host.branches(block) for block in self._blocks]
        self._indices = [[index for index, _ in self._layout.branches_of(number)] for number in range(len(self._blocks))]
        self._bodies = [[compiled_body(branch.body) if compile else branch.body for branch in program] for program in self._programs]
        self._stores: dict[int, FeatureStore] = {}
        self._stream: ResidualStream | None = None
        self._tip: Deferred | None = None
        self._handed: weakref.WeakSet[Deferred] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of stored features, all calls of a step together."""
        return sum(store.nbytes for store in self._stores.values())

    def clear(self) -> None:
        """Free every feature and forget the stream."""
        self._stores.clear()
        self._stream = self._tip = None

    def open(self, plan: StepPlan, step: int, call: int, table: ModulationTable | None, keep_trunk: bool) -> None:
        """Begin a model call that follows `plan`; keep_trunk: later steps may skip the trunk."""
        self._plan, self._step, self._keep_trunk = plan, step, keep_trunk
        self._store = self._stores.setdefault(call, FeatureStore())
        self._table, self._table_row = table, None
        self._memo: dict = {}
        self._recomputed = False
        self._checked = False

    def close(self) -> Done:
        """End the model call. What the host still holds gets its value before slots are written again."""
        self._stream = self._tip = None
        for deferred in list(self._handed):
            deferred.materialised()
        self._handed.clear()
        self._memo = {}
        return Done(self._plan.kind, self._recomputed)

    def block(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Run one block: queue its branches; the last block, or one with hooks, applies them."""
        x, condition = self._host.block_inputs(args, kwargs)
        if not self._checked:
            self._check_features(x, condition)
        last = number == len(self._blocks) - 1
        if self._plan.skip:
            return self._store.feature(TRUNK) if last else x
        stream = self._continued(x)
        vectors = self._vectors(number, condition)
        for position, (index, branch) in enumerate(zip(self._indices[number], self._programs[number], strict=True)):
            gate, row = vectors.gate(position, branch)
            if self._plan.actions[index].kind is Kind.REUSE:
                stream.add(self._store.feature(index), gate, gate_row=row)
                continue
            h = stream.modulated(vectors.vector(branch.shift), vectors.vector(branch.scale), norm=branch.norm, weight=branch.norm_weight, bias=branch.norm_bias, eps=branch.eps)
            self._queue_fresh(stream, index, _rowwise(self._bodies[number][position](h)), gate, row)
        return self._handed_on(number, stream, last)

    def _queue_fresh(self, stream: ResidualStream, index: int, feature: Tensor, gate: Tensor | None, row: int | None) -> None:
        if self._own:
            stream.refresh(self._store.own(index, feature, self._step).tensor, feature, None, gate, gate_row=row)
        else:
            self._store.borrow(index, feature, self._step)
            stream.add(feature, gate, gate_row=row)

    def _handed_on(self, number: int, stream: ResidualStream, last: bool) -> Tensor:
        if not last and not _hooked(self._blocks[number]):
            self._stream, self._tip = stream, Deferred(stream)
            if self._own:
                self._handed.add(self._tip)
            return self._tip
        value = stream.value()
        self._stream = self._tip = None
        if last and self._keep_trunk:
            self._store.borrow(TRUNK, value, self._step)
        return value

    def _continued(self, x: Tensor) -> ResidualStream:
        """The stream that x stands for: the running one, an earlier one, or a new one."""
        if not isinstance(x, Deferred):
            return ResidualStream(_rowwise(x))
        if x is self._tip and x.value is None:
            return self._stream
        return x.stream()

    def _check_features(self, x: Tensor, condition: Tensor) -> None:
        """Recompute, never broadcast: a plan whose features are missing or of another shape runs in full."""
        self._checked = True
        if self._table is not None and condition.shape[0] != self._table.vectors.shape[2]:
            self._table = None
        if self._table is not None and self._step == 0:
            self._table.verify(condition)
        needed = [TRUNK] if self._plan.skip else [index for index, action in enumerate(self._plan.actions) if action.kind is not Kind.COMPUTE]
        if not all(self._store.usable(index, x) for index in needed):
            self._plan = full_step(self._layout)
            self._recomputed = True

    def _vectors(self, number: int, condition: Tensor) -> Vectors:
        if self._table is not None:
            if self._table_row is None:  # one tensor object for all blocks: their gates are then one packed tensor
                self._table_row = self._table.vectors[self._step]
            return Vectors(table=self._table_row, first=number * self._host.vectors)
        block = self._blocks[number]
        if all(self._plan.actions[index].kind is Kind.REUSE for index in self._indices[number]):
            return Vectors(gates=self._host.gates(block, condition, self._memo))
        return Vectors(every=self._host.modulation(block, condition))


def compiled_body(body: torch.nn.Module) -> Any:
    """A branch body compiled as one graph that serves every layer and batch size."""
    compiled = torch.compile(body, fullgraph=True)

    def call(h: Tensor) -> Tensor:
        for dimension in (0, 1):
            if h.shape[dimension] > 1:
                torch._dynamo.maybe_mark_dynamic(h, dimension)
        return compiled(h)

    return call


def _rowwise(feature: Tensor) -> Tensor:
    """The tensor with unit stride in its last dimension, as the kernels read it.

    A patch embedding's flatten and transpose leaves channels strided: one copy a step.
    """
    return feature if feature.stride(-1) == 1 or feature.shape[-1] <= 1 else feature.contiguous()


def _hooked(block: torch.nn.Module) -> bool:
    """True if someone looks at what this block returns."""
    return bool(block._forward_hooks or torch_module._global_forward_hooks)
