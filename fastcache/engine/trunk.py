"""One pass through a host's blocks by a step's plan: the way of a call below the session."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from fastcache.engine.features import FeatureStore
from fastcache.engine.modulation.gate_bank import GateBank
from fastcache.engine.modulation.table import ModulationTable
from fastcache.engine.tokens.selector import TokenSelector
from fastcache.engine.tokens.tap import AttentionTap
from fastcache.hosts import Host, HostBranch
from fastcache.ops import SlotMap
from fastcache.plan.actions import Action, Kind
from fastcache.plan.forecast import forecast_weights
from fastcache.plan.schedule import Schedule
from fastcache.plan.selection import Score
from fastcache.plan.step import StepPlan, full_step
from fastcache.stream.deferred import Deferred
from fastcache.stream.residual_stream import ResidualStream

TRUNK = -1  # feature index of the trunk's output, kept for skipped steps


@dataclass(frozen=True)
class Vectors:
    """Modulation of one block: [B, V, D] of the host, gates alone, or rows of a table.

    bank [L * G, B, D]: gates of all blocks; this block's begin at row `first`. Beside it, `every`
    may hold vectors from number `start` on only.
    """

    every: Tensor | None = None
    start: int = 0
    gates: list[Tensor | None] | None = None
    bank: Tensor | None = None
    banked: tuple[int, ...] = ()  # vectors that the bank holds of each block
    table: Tensor | None = None
    first: int = 0

    def vector(self, row: int | None) -> Tensor | None:
        """Shift or scale vector [B, D]."""
        if row is None:
            return None
        return self.every[:, row - self.start] if self.table is None else self.table[self.first + row]

    def gate(self, number: int, branch: HostBranch) -> tuple[Tensor | None, int | None]:
        """(gate, row) of a branch as ResidualStream.add takes it."""
        if branch.gate is None:
            return None, None
        if self.table is not None:
            return self.table, self.first + branch.gate
        if self.bank is not None:
            return self.bank, self.first + self.banked.index(branch.gate)
        return (self.gates[number] if self.every is None else self.every[:, branch.gate]), None


@dataclass(frozen=True)
class Done:
    """What a call turned out to be: its step kind, and whether a cached step had to be recomputed."""

    kind: str
    recomputed: bool


class Trunk:
    """Runs blocks branch by branch over a ResidualStream, storing and reusing features."""

    def __init__(
        self, host: Host, *, own_features: bool, feature_dtype: torch.dtype | None, compile: bool
    ) -> None:
        self._host = host
        self._own, self._dtype, self._compile = (
            own_features or feature_dtype is not None,
            feature_dtype,
            compile,
        )
        self._blocks = host.blocks
        self._layout = host.layout()
        self._programs = [host.branches(block) for block in self._blocks]
        self._indices = [
            [index for index, _ in self._layout.branches_of(number)] for number in range(len(self._blocks))
        ]
        self._bodies = [
            [compiled_body(branch.body) if compile else branch.body for branch in program]
            for program in self._programs
        ]
        self._bank = GateBank(host)
        self._stores: dict[int, FeatureStore] = {}
        self._selectors: dict[int, TokenSelector] = {}
        self._stream: ResidualStream | None = None
        self._tip: Deferred | None = None
        self._handed: weakref.WeakSet[Deferred] = weakref.WeakSet()

    def follow(self, schedule: Schedule, history: int = 1) -> None:
        """The schedule of the coming steps, and how many features of a branch to keep at least."""
        self._schedule = schedule
        self._depth = max(history, schedule.history)
        self._refreshed = schedule.refreshed
        self._score: Score | None = schedule.selection.score if schedule.refreshed else None
        self._writes = self._own or bool(schedule.refreshed)  # some slot of a branch is written in place
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of stored features, all calls of a step together."""
        return sum(store.nbytes for store in self._stores.values())

    @property
    def bank_nbytes(self) -> int:
        """Bytes of gate weights that were copied together."""
        return self._bank.nbytes

    def clear(self) -> None:
        """Free every feature and forget the stream."""
        self._stores.clear()
        self._selectors.clear()
        self._bank.look_again()
        self._stream = self._tip = None

    def history(self) -> list[list[Tensor]]:
        """The stored features of every branch of the layout, newest first, of the call that was opened
        last.
        """
        return [self._store.history(index) for index in range(len(self._layout.branches))]

    def chosen_tokens(self) -> dict[int, Tensor]:
        """[B, N] bool by branch: the tokens that the call that was opened last recomputed."""
        if self._selector is None:
            return {}
        found = {index: self._selector.chosen(index) for index in sorted(self._refreshed)}
        return {index: choice.slots >= 0 for index, choice in found.items() if choice is not None}

    def open(self, plan: StepPlan, step: int, call: int, table: ModulationTable | None) -> None:
        """Begin a model call that follows `plan`."""
        self._plan, self._step = plan, step
        self._store = self._stores.setdefault(call, FeatureStore(self._depth, self._dtype))
        self._selector = None
        if self._refreshed:
            self._selector = self._selectors.setdefault(
                call, TokenSelector(self._schedule.selection, sorted(self._refreshed))
            )
            self._selector.begin_step()
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
            if number in self._plan.run_blocks:  # what it computes is stored, and its output thrown away
                aside = ResidualStream(_rowwise(x))
                self._queue_branches(number, aside, condition)
                aside.value()
            return self._store.feature(TRUNK) if last else x
        stream = self._continued(x)
        self._queue_branches(number, stream, condition)
        return self._handed_on(number, stream, last)

    def _queue_branches(self, number: int, stream: ResidualStream, condition: Tensor) -> None:
        vectors = self._vectors(number, condition)
        for position, (index, branch) in enumerate(
            zip(self._indices[number], self._programs[number], strict=True)
        ):
            action = self._plan.actions[index]
            gate, row = vectors.gate(position, branch)
            if action.kind is Kind.COMPUTE:
                feature = self._run_body(number, position, self._modulated(stream, vectors, branch))
                self._queue_fresh(stream, index, feature, gate, row)
            elif action.kind is Kind.REFRESH and not self._plan.skip:
                self._queue_refreshed(stream, number, position, action, vectors, gate, row)
            elif action.kind is Kind.FORECAST and not self._plan.skip:
                self._queue_forecast(stream, index, action.order, gate, row)
            elif not self._plan.skip:
                stream.add(self._store.feature(index), gate, gate_row=row)

    def _modulated(
        self, stream: ResidualStream, vectors: Vectors, branch: HostBranch, rows: SlotMap | None = None
    ) -> Tensor:
        return stream.modulated(
            vectors.vector(branch.shift),
            vectors.vector(branch.scale),
            rows=rows,
            norm=branch.norm,
            weight=branch.norm_weight,
            bias=branch.norm_bias,
            eps=branch.eps,
        )

    def _run_body(self, number: int, position: int, h: Tensor) -> Tensor:
        """A branch's body on all tokens; an attention that scores are taken from is read while it runs."""
        branch = self._programs[number][position]
        targets = (
            [index for index in self._indices[number] if index in self._refreshed]
            if branch.attention and self._score is not None and self._score.taken
            else []
        )
        if not targets:
            return _rowwise(self._bodies[number][position](h))
        tap = AttentionTap(f"blocks.{number}.{branch.name}", branch.body)
        output = _rowwise(tap.run(h))
        for index in targets:
            self._selector.take(index, tap)
        return output

    def _queue_fresh(
        self, stream: ResidualStream, index: int, feature: Tensor, gate: Tensor | None, row: int | None
    ) -> None:
        if self._own or index in self._refreshed:
            stream.refresh(
                self._store.buffer(index, feature, self._step).tensor, feature, None, gate, gate_row=row
            )
        else:
            self._store.borrow(index, feature, self._step)
            stream.add(feature, gate, gate_row=row)

    def _queue_refreshed(
        self,
        stream: ResidualStream,
        number: int,
        position: int,
        action: Action,
        vectors: Vectors,
        gate: Tensor | None,
        row: int | None,
    ) -> None:
        """Recompute the chosen tokens into the stored feature, and queue it."""
        index, branch = self._indices[number][position], self._programs[number][position]
        feature = self._store.feature(index)
        if self._score.local and action.tokens > 0:
            self._selector.choose_here(index, action.tokens, self._capacity(action), stream.value(), feature)
        choice = self._selector.chosen(index)
        if choice is None:
            stream.add(feature, gate, gate_row=row)
            return
        fresh = _rowwise(self._bodies[number][position](self._modulated(stream, vectors, branch, choice)))
        stream.refresh(self._store.own(index).tensor, fresh, choice, gate, gate_row=row)

    def _queue_forecast(
        self, stream: ResidualStream, index: int, order: int, gate: Tensor | None, row: int | None
    ) -> None:
        """Queue the forecast as one term per stored feature, weighted on the host."""
        steps = tuple(self._store.steps(index))
        weights = self._memo.get((steps, order))  # the same for most branches of a step
        if weights is None:
            weights = self._memo[steps, order] = forecast_weights(
                self._step, steps, min(order, len(steps) - 1)
            )
        for back, weight in enumerate(weights):
            stream.add(self._store.feature(index, back), gate, gate_row=row, weight=weight)

    def _capacity(self, action: Action) -> int:
        """Rows that are packed: a compiled body would be compiled again for one token."""
        return max(action.tokens, 2) if self._compile else action.tokens

    def _handed_on(self, number: int, stream: ResidualStream, last: bool) -> Tensor:
        if not last and not _hooked(self._blocks[number]):
            self._stream, self._tip = stream, Deferred(stream)
            if self._writes:
                self._handed.add(self._tip)
            return self._tip
        value = stream.value()
        self._stream = self._tip = None
        if last and self._schedule.skips:
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
        needed = (
            [TRUNK]
            if self._plan.skip
            else [index for index, action in enumerate(self._plan.actions) if action.kind is not Kind.COMPUTE]
        )
        if not all(self._store.usable(index, x) for index in needed):
            self._plan = full_step(self._layout)
            self._recomputed = True
        if self._selector is not None:
            self._prepare_selection(x)

    def _prepare_selection(self, x: Tensor) -> None:
        """Ages of what is computed start again; where scores are known already, all choices are made here."""
        actions = {index: self._plan.actions[index] for index in sorted(self._refreshed)}
        computed = [index for index, action in actions.items() if action.kind is Kind.COMPUTE]
        if computed:
            self._selector.restart(computed, x)
        wanted = {index: action for index, action in actions.items() if action.kind is Kind.REFRESH}
        if not wanted or self._plan.skip:
            return
        if self._score.local:
            self._selector.pass_over([index for index, action in wanted.items() if action.tokens == 0])
        else:
            self._selector.choose_all(
                {index: action.tokens for index, action in wanted.items()},
                {index: self._capacity(action) for index, action in wanted.items()},
                x,
            )

    def _vectors(self, number: int, condition: Tensor) -> Vectors:
        if self._table is not None:
            if (
                self._table_row is None
            ):  # one tensor object for all blocks: their gates are then one packed tensor
                self._table_row = self._table.vectors[self._step]
            return Vectors(table=self._table_row, first=number * self._host.vectors)
        block = self._blocks[number]
        running = [
            branch
            for index, branch in zip(self._indices[number], self._programs[number], strict=True)
            if self._runs_body(self._plan.actions[index])
        ]
        if len(running) == len(self._programs[number]):
            return Vectors(every=self._host.modulation(block, condition))
        bank = self._gates_of_all(condition)
        if bank is None:
            return (
                Vectors(every=self._host.modulation(block, condition))
                if running
                else Vectors(gates=self._host.gates(block, condition, self._memo))
            )
        banked = self._bank.vectors_held
        first = number * len(banked)
        wanted = [row for branch in running for row in (branch.shift, branch.scale) if row is not None]
        if not wanted:
            return Vectors(bank=bank, banked=banked, first=first)
        return Vectors(
            bank=bank,
            banked=banked,
            first=first,
            start=min(wanted),
            every=self._bank.vectors(number, min(wanted), max(wanted) + 1, condition),
        )

    def _gates_of_all(self, condition: Tensor) -> Tensor | None:
        """Gates of all blocks, which share a condition, made at the first block that asks; None if this
        block's is another.
        """
        known, bank = self._memo.get("bank", (None, None))
        if known is None and len(self._plan.run_blocks) > 1:
            known, bank = self._memo["bank"] = condition, self._bank.gates(condition)
        return bank if known is condition else None

    @staticmethod
    def _runs_body(action: Action) -> bool:
        return action.kind is Kind.COMPUTE or (action.kind is Kind.REFRESH and action.tokens > 0)


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
