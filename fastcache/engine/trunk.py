"""One pass through a host's blocks by a step's plan: the way of a call below the session."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastcache.engine.calls import Key
from fastcache.engine.device_check import Claim, DeviceCheck
from fastcache.engine.features import TRUNK, FeatureStore
from fastcache.engine.modulation.gate_bank import GateBank
from fastcache.engine.modulation.table import Announcement
from fastcache.engine.modulation.vectors import BankedGates, BlockVectors, HostVectors, OnlyGates, TableRows
from fastcache.engine.tokens.selector import TokenSelector
from fastcache.engine.tokens.tap import AttentionTap
from fastcache.errors import HostError, SessionError
from fastcache.hosts import Host, HostBranch, Proof, fused_norm
from fastcache.ops import Norm, SlotMap, relative_error
from fastcache.plan.actions import Action, Kind
from fastcache.plan.forecast import forecast_weights
from fastcache.plan.schedule import Schedule
from fastcache.plan.selection import Score
from fastcache.plan.step import StepPlan, full_step
from fastcache.stream import Deferred, ResidualStream
from fastcache.stream.residual_stream import tensor_version

Candidates = tuple[StepPlan, ...] | None  # what may be decided besides the schedule; None: anything
Planner = Callable[[int], StepPlan]  # the step's plan for another number of tokens


@dataclass(frozen=True)
class CallOutcome:
    """What a call turned out to be: its step kind, and whether a cached step had to be recomputed."""

    kind: str
    recomputed: bool


@dataclass(frozen=True)
class ModelCall:
    """One call of the model, as the session opens it.

    sample: the latents that the model got. planner: asked where the number of tokens is not that of
    the schedule. prove: blocks may be compared with their own forward, which reads the device.
    """

    plan: StepPlan
    step: int
    key: Key
    announcement: Announcement | None
    sample: Tensor | None
    planner: Planner
    prove: bool


class Trunk:
    """Runs blocks branch by branch over a ResidualStream, storing and reusing features."""

    def __init__(
        self,
        host: Host,
        *,
        feature_dtype: torch.dtype | None,
        compile: bool,
        proof: Proof,
        check: DeviceCheck,
    ) -> None:
        self._host, self._proof, self._check = host, proof, check
        self._dtype, self._compile = feature_dtype, compile
        self._blocks = host.blocks
        self._layout = host.layout()
        self._indices = [
            [index for index, _ in self._layout.branches_of(number)] for number in range(len(self._blocks))
        ]
        self._compiled: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
        self._bank = GateBank(host)
        self._stores: dict[Key, FeatureStore] = {}
        self._selectors: dict[Key, TokenSelector] = {}
        self._orders: dict[Key, tuple[int, ...]] = {}  # of blocks, at the last call that ran the trunk
        self._entries: dict[
            Key, tuple[Any, ...]
        ] = {}  # shape and dtype of x at the last call that ran the trunk
        self.devices: set[torch.device] = set()  # on which blocks have run
        self._handed: weakref.WeakSet[Deferred] = weakref.WeakSet()
        self._forget_call()

    def follow(self, schedule: Schedule, candidates: Candidates, history: int = 1) -> None:
        """The schedule of the coming steps, what else may be decided, and how many features of a branch to
        keep at least.
        """
        self._adopt(schedule, candidates, history)
        self.clear()

    def adopt(self, schedule: Schedule, candidates: Candidates, history: int = 1) -> None:
        """As `follow`, in the middle of a generation: what is stored stays."""
        before = self._refreshed
        self._adopt(schedule, candidates, history)
        if before != self._refreshed:
            self._selectors.clear()

    def _adopt(self, schedule: Schedule, candidates: Candidates, history: int) -> None:
        occurring = (*schedule.steps, *(candidates or ()))
        self._schedule, self._layout = schedule, schedule.layout
        anything = candidates is None
        self._skips = anything or any(step.skip for step in occurring)
        self._refreshed = frozenset(
            index
            for step in occurring
            for index, action in enumerate(step.actions)
            if action.kind is Kind.REFRESH or (anything and schedule.selection is not None)
        )
        orders = [action.order or 0 for step in occurring for action in step.actions]
        self._depth = max(history, 1 + max(orders, default=0), 2 if anything else 1)
        self._score: Score | None = (
            schedule.selection.score if self._refreshed and schedule.selection else None
        )

    def supports(self, plan: StepPlan) -> str | None:
        """What a step plan that was decided needs and the schedule never named; None if nothing."""
        if plan.skip and not self._skips:
            return "skips the trunk"
        for index, action in enumerate(plan.actions):
            if action.kind is Kind.REFRESH and self._schedule.selection is None:
                return "refreshes tokens without a selection in its schedule that says how they are chosen"
            if action.kind is Kind.REFRESH and index not in self._refreshed:
                branch = self._layout.branches[index]
                return f"refreshes {branch.name} of block {branch.block}"
            if action.kind is Kind.FORECAST and (action.order or 0) >= self._depth:
                return f"forecasts with order {action.order}"
        return None

    @property
    def _scored_at_refresh(self) -> bool:
        return self._score is not None and self._score.local

    @property
    def draws(self) -> bool:
        """True if tokens are chosen by random numbers, for which the latents are compared."""
        return self._score in (Score.RANDOM, Score.COMPRESS)

    @property
    def nbytes(self) -> int:
        """Bytes of stored features, all calls of a step together."""
        return sum(store.nbytes for store in self._stores.values())

    @property
    def bank_nbytes(self) -> int:
        """Bytes of gate weights that were copied together."""
        return self._bank.nbytes

    def begin_generation(self) -> None:
        """The next call is the first one of a generation: weights and modules are looked at anew."""
        self._bank.begin_generation()
        for selector in self._selectors.values():
            selector.begin_generation()

    def end_generation(self) -> None:
        """The last call was made: were the weights of the gates those that were copied?"""
        drift = self._bank.drift()
        if drift is not None:
            self._check.note(Claim.GATES, self._step, drift, 1e-30)

    def clear(self) -> None:
        """Free every feature and forget the stream."""
        self._stores.clear()
        self._selectors.clear()
        self._orders.clear()
        self._entries.clear()
        self._bank.clear()
        self._handed.clear()
        self._forget_call()

    def history(self) -> list[list[Tensor]]:
        """The stored features of every branch of the layout, newest first, of the call that was opened
        last."""
        return [self._store.history(index) for index in range(len(self._layout.branches))]

    def chosen_tokens(self) -> dict[int, Tensor]:
        """[B, N] bool by branch: the tokens that the call that was opened last recomputed."""
        if self._choosing is None:
            return {}
        found = {index: self._selector.chosen(index) for index in sorted(self._refreshed)}
        return {index: choice.slots >= 0 for index, choice in found.items() if choice is not None}

    # -- one call ---------------------------------------------------------------------------------

    def _forget_call(self) -> None:
        self._store = FeatureStore()
        self._choosing: TokenSelector | None = None
        self._opened: ModelCall | None = None
        self._stream: ResidualStream | None = None
        self._tip: Deferred | None = None
        self._memo: dict[Any, Any] = {}
        self._checked_condition: tuple[Tensor | None, int | None] = (None, None)
        self._first_condition: tuple[Tensor, Tensor] | None = None  # and a copy
        self._ran: list[int] = []

    @property
    def _call(self) -> ModelCall:
        """The call that was opened last."""
        assert self._opened is not None, "a model call is opened first"
        return self._opened

    @property
    def _selector(self) -> TokenSelector:
        """What chooses tokens in this call; there is one wherever the schedule refreshes any."""
        assert self._choosing is not None, "a schedule that refreshes tokens has a selector"
        return self._choosing

    def open(self, call: ModelCall) -> None:
        """Begin a model call."""
        self._forget_call()
        self._opened, self._plan, self._step = call, call.plan, call.step
        self._store = self._stores.setdefault(call.key, FeatureStore(self._depth, self._dtype))
        if self._refreshed:
            self._choosing = self._selector_of(call)
        self._bank.begin_step()
        self._recomputed = False

    def _selector_of(self, call: ModelCall) -> TokenSelector:
        if self._schedule.selection is None:
            raise SessionError(
                "selection: a step refreshes tokens and the schedule does not say how they are chosen;"
                " return a Schedule with selection=Selection(...)"
            )
        if call.key not in self._selectors:
            self._selectors[call.key] = TokenSelector(self._schedule.selection, sorted(self._refreshed))
        self._selectors[call.key].begin_step()
        return self._selectors[call.key]

    def close(self) -> CallOutcome:
        """End the model call. What the host still holds gets its value before slots are written again."""
        key = self._call.key
        if self._plan.skip:
            self._require_order(len(self._ran), whole=True)
        elif self._ran:
            self._orders[key] = tuple(self._ran)
            if self._skips and self._trunk_at != len(self._ran):
                raise HostError(
                    f"blocks: block {self._ran[-1]} ran after blocks[{len(self._blocks) - 1}], so the plan's"
                    " skipped steps would not know where the trunk ends; use a policy that skips no step"
                )
        self._check_unwritten()
        self._stream = self._tip = None
        for deferred in list(self._handed):
            deferred.materialised()
        self._handed.clear()
        self._memo = {}
        return CallOutcome(self._plan.kind, self._recomputed)

    def _check_unwritten(self) -> None:
        """In inference mode PyTorch does not tell whether a condition was written between blocks: compare."""
        first = self._first_condition
        if first is not None and (self._call.announcement is not None or "bank" in self._memo):
            tensor, copy = first
            error = relative_error([copy[:, None]], [tensor.to(copy.dtype)[:, None]])
            self._check.note(Claim.UNWRITTEN, self._step, error, 1e-6)

    def block(
        self, number: int, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Run one block: queue its branches; the last block, or one with hooks, applies them."""
        x, condition = self._host.block_inputs(args, kwargs)
        if not self._ran:
            self._prepare(x, condition)
        self._ran.append(number)
        self.devices.add(x.device)
        self._require_announced(condition)
        last = number == len(self._blocks) - 1
        if self._plan.skip:
            return self._skipped_block(number, x, condition, last)
        if self._call.prove and self._runs_whole(number) and self._proof.lacks(self._blocks[number]):
            plain = x.materialised() if isinstance(x, Deferred) else x
            self._proof.require(number, self._blocks[number], original, plain, args, kwargs)
        stream = self._continued(x)
        self._queue_branches(number, stream, condition)
        return self._handed_on(number, stream, last)

    def _skipped_block(self, number: int, x: Tensor, condition: Tensor, last: bool) -> Tensor:
        self._require_order(len(self._ran), whole=False)
        if number in self._plan.run_blocks:  # what it computes is stored, and its output thrown away
            discarded = ResidualStream(_rowwise(x))
            self._queue_branches(number, discarded, condition)
            discarded.value()
        if not last:
            return x
        return self._store.feature(TRUNK, device=x.device).clone()  # the host may write what it gets

    def _require_order(self, count: int, *, whole: bool) -> None:
        """A skipped step stands for the same blocks, in the same order, as the step that it repeats."""
        order = self._orders.get(self._call.key, ())
        if tuple(self._ran) != order[:count] or (whole and count != len(order)):
            raise HostError(
                f"blocks: a skipped step repeats the trunk of an earlier step, which ran blocks"
                f" {_shown(order)}, but the model now runs {_shown(self._ran)}; use a policy that skips no"
                " step"
            )

    def _runs_whole(self, number: int) -> bool:
        return all(self._plan.actions[index].kind is Kind.COMPUTE for index in self._indices[number])

    def _queue_branches(self, number: int, stream: ResidualStream, condition: Tensor) -> None:
        branches = self._host.branches(self._blocks[number])
        vectors = self._vectors(number, branches, condition)
        for position, (index, branch) in enumerate(zip(self._indices[number], branches, strict=True)):
            action = self._plan.actions[index]
            gate, row = vectors.gate(position, branch)
            if action.kind is Kind.COMPUTE:
                feature = self._run_body(number, branch, self._modulated(stream, vectors, branch))
                slot = self._store.buffer(index, feature, self._step)
                stream.refresh(slot, feature, None, gate, gate_row=row)
            elif self._plan.skip:
                continue
            elif action.kind is Kind.REFRESH:
                self._queue_refreshed(stream, number, index, branch, action, vectors, gate, row)
            elif action.kind is Kind.FORECAST:
                self._queue_forecast(stream, index, action.order or 0, gate, row)
            else:
                stream.add(self._stored(stream, index), gate, gate_row=row)

    def _stored(self, stream: ResidualStream, index: int, back: int = 0) -> Tensor:
        feature = self._store.feature(index, back, stream.base.device)
        if feature.shape != stream.base.shape:
            branch = self._layout.branches[index]
            raise SessionError(
                f"blocks[{branch.block}].{branch.name}: the stream is {list(stream.base.shape)} there, its"
                f" stored feature {list(feature.shape)}, though the first block got what it had got; call"
                " session.reset() where the model changes the tokens of its blocks"
            )
        return feature

    def _modulated(
        self, stream: ResidualStream, vectors: BlockVectors, branch: HostBranch, rows: SlotMap | None = None
    ) -> Tensor:
        shift, scale = vectors.vector(branch.shift), vectors.vector(branch.scale)
        norm = fused_norm(branch.norm, stream.base)
        if norm is not None:
            return stream.modulated(
                shift, scale, rows=rows, norm=norm.norm, weight=norm.weight, bias=norm.bias, eps=norm.eps
            )
        normalised = ResidualStream(
            _rowwise(branch.norm(stream.value()))
        )  # the module as it is, hooks included
        return normalised.modulated(shift, scale, rows=rows, norm=Norm.IDENTITY)

    def _body(self, branch: HostBranch) -> Callable[..., Any]:
        """The host's module of now, or its compiled form."""
        body = branch.body
        if not self._compile:
            return body
        if body not in self._compiled:
            self._compiled[body] = compiled_body(body)
        return self._compiled[body]

    def _run_body(self, number: int, branch: HostBranch, h: Tensor) -> Tensor:
        """A branch's body on all tokens; an attention that scores are taken from is read while it runs."""
        name = f"blocks.{number}.{branch.name}"
        targets = (
            [index for index in self._indices[number] if index in self._refreshed]
            if branch.attention and self._score is not None and self._score.taken
            else []
        )
        if not targets:
            return _feature(name, self._body(branch)(h), h)
        tap = AttentionTap(name, branch.body, prove=self._call.prove)
        output = _feature(name, tap.run(h), h)
        for index in targets:
            self._selector.take(index, tap)
        return output

    def _queue_refreshed(
        self,
        stream: ResidualStream,
        number: int,
        index: int,
        branch: HostBranch,
        action: Action,
        vectors: BlockVectors,
        gate: Tensor | None,
        row: int | None,
    ) -> None:
        """Recompute the chosen tokens into the stored feature, and queue it."""
        feature = self._stored(stream, index)
        if self._scored_at_refresh and action.fresh_tokens > 0:
            self._selector.choose_here(
                index, action.fresh_tokens, self._capacity(action), stream.value(), feature
            )
        choice = self._selector.chosen(index)
        if choice is None:
            stream.add(feature, gate, gate_row=row)
            return
        h = self._modulated(stream, vectors, branch, choice)
        fresh = _feature(f"blocks.{number}.{branch.name}", self._body(branch)(h), h)
        stream.refresh(feature, fresh, choice, gate, gate_row=row)

    def _queue_forecast(
        self, stream: ResidualStream, index: int, order: int, gate: Tensor | None, row: int | None
    ) -> None:
        """Queue the forecast as one term per stored feature, weighted on the host."""
        steps = tuple(self._store.steps(index))
        weights = self._memo.get((steps, order))  # the same for most branches of a step
        if weights is None:
            weights = forecast_weights(self._step, steps, min(order, len(steps) - 1))
            self._memo[steps, order] = weights
        for back, weight in enumerate(weights):
            stream.add(self._stored(stream, index, back), gate, gate_row=row, weight=weight)

    def _capacity(self, action: Action) -> int:
        """Rows that are packed: a compiled body would be compiled again for one token."""
        return max(action.fresh_tokens, 2) if self._compile else action.fresh_tokens

    def _handed_on(self, number: int, stream: ResidualStream, last: bool) -> Tensor:
        if not last and not _hooked(self._blocks[number]):
            self._stream, self._tip = stream, Deferred(stream)
            self._handed.add(self._tip)
            return self._tip
        value = stream.value()
        self._stream = self._tip = None
        if last and self._skips:
            self._store.keep(TRUNK, value, self._step)
            self._trunk_at = len(self._ran)
        return value

    def _continued(self, x: Tensor) -> ResidualStream:
        """The stream that x stands for: the running one, an earlier one, or a new one."""
        if isinstance(x, Deferred) and x.value is None:
            return self._stream if x is self._tip and self._stream is not None else x.stream()
        plain = _rowwise(x.materialised() if isinstance(x, Deferred) else x)
        # the host may write what it handed over: PyTorch tells, but for tensors of inference mode
        return ResidualStream(plain.clone() if plain.is_inference() else plain)

    # -- before the first block -------------------------------------------------------------------------

    def _prepare(self, x: Tensor, condition: Tensor) -> None:
        """Recompute, never broadcast: a plan whose features are missing or of another shape runs in full."""
        self._trunk_at = 0
        if condition.is_inference():
            self._first_condition = condition, condition.clone()
        tokens = x.shape[1]
        if tokens != self._layout.tokens:
            self._plan = self._call.planner(tokens)
        entry = (x.shape, x.dtype)
        fits = self._entries.get(self._call.key) == entry
        if not all(
            self._is_usable(index, action, fits) for index, action in enumerate(self._plan.actions)
        ) or (self._plan.skip and not (fits and self._store.has(TRUNK))):
            self._plan = full_step(self._layout)
            self._recomputed = True
        self._entries[self._call.key] = entry
        if self._choosing is not None:
            if self.draws:
                self._selector.see(self._call.sample, condition)
            self._prepare_selection(x)

    def _is_usable(self, index: int, action: Action, fits: bool) -> bool:
        if action.kind is Kind.COMPUTE or self._plan.skip:
            return True
        return fits and self._store.has(index, self._step if action.kind is Kind.FORECAST else None)

    def _prepare_selection(self, x: Tensor) -> None:
        """Ages of what is computed start again; where scores are known already, all choices are made here."""
        actions = {index: self._plan.actions[index] for index in sorted(self._refreshed)}
        computed = [index for index, action in actions.items() if action.kind is Kind.COMPUTE]
        if computed:
            self._selector.restart(computed, x)
        wanted = {index: action for index, action in actions.items() if action.kind is Kind.REFRESH}
        if not wanted or self._plan.skip:
            return
        if self._scored_at_refresh:
            self._selector.age_all([index for index, action in wanted.items() if action.fresh_tokens == 0])
        else:
            self._selector.choose_all(
                {index: action.fresh_tokens for index, action in wanted.items()},
                {index: self._capacity(action) for index, action in wanted.items()},
                x,
            )

    # -- modulation -----------------------------------------------------------------------------------

    def _require_announced(self, condition: Tensor) -> None:
        """Compare a condition with what was announced: once a call, and again where a block gets another."""
        announcement = self._call.announcement
        if announcement is None or self._same_condition(self._checked_condition, condition):
            return
        self._checked_condition = condition, tensor_version(condition)
        error = announcement.error(self._step, condition)
        self._check.note(Claim.CONDITIONS, self._step, error, announcement.tolerance)

    @staticmethod
    def _same_condition(known: tuple[Tensor | None, int | None], condition: Tensor) -> bool:
        return known[0] is condition and known[1] == tensor_version(condition)

    def _vectors(self, number: int, branches: tuple[HostBranch, ...], condition: Tensor) -> BlockVectors:
        announcement = self._call.announcement
        if announcement is not None:
            return TableRows(announcement.rows(self._step, condition.device), number * self._host.vectors)
        block = self._blocks[number]
        running = [
            branch
            for index, branch in zip(self._indices[number], branches, strict=True)
            if self._runs_body(self._plan.actions[index])
        ]
        if len(running) == len(branches):
            return HostVectors(self._host.modulation(block, condition))
        bank = self._gates_of_all(condition)
        if bank is None:
            if running:
                return HostVectors(self._host.modulation(block, condition))
            return OnlyGates(self._host.gates(block, condition, {}))
        held = self._bank.vectors_held
        first = number * len(held)
        wanted = [row for branch in running for row in (branch.shift, branch.scale) if row is not None]
        if not wanted:
            return BankedGates(bank, first, held)
        start = min(wanted)
        some = self._bank.vectors(number, start, max(wanted) + 1, condition)
        return BankedGates(bank, first, held, some, start)

    def _gates_of_all(self, condition: Tensor) -> Tensor | None:
        """Gates of all blocks, which share a condition, made at the first block that asks; None if this
        block's is another.
        """
        if "bank" not in self._memo and len(self._plan.run_blocks) > 1:
            self._memo["bank"] = (condition, tensor_version(condition)), self._bank.gates(condition)
        known, bank = self._memo.get("bank", ((None, None), None))
        return bank if self._same_condition(known, condition) else None

    @staticmethod
    def _runs_body(action: Action) -> bool:
        return action.kind is Kind.COMPUTE or (action.kind is Kind.REFRESH and action.fresh_tokens > 0)


def compiled_body(body: nn.Module) -> Any:
    """A branch body compiled as one graph that serves every layer and batch size."""
    compiled = torch.compile(body, fullgraph=True)

    def call(h: Tensor) -> Tensor:
        for dimension in (0, 1):
            if h.shape[dimension] > 1:
                torch._dynamo.maybe_mark_dynamic(h, dimension)
        return compiled(h)

    return call


def _feature(name: str, output: Any, h: Tensor) -> Tensor:
    """What a body returned, if that is one tensor like its input, with unit stride in its last dimension."""
    if not isinstance(output, Tensor) or output.shape != h.shape:
        told = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HostError(f"{name}: expected one tensor {list(h.shape)} from a branch's body, got {told}")
    return _rowwise(output)


def _rowwise(feature: Tensor) -> Tensor:
    """The tensor with unit stride in its last dimension, as the kernels read it.

    A patch embedding's flatten and transpose leaves channels strided: one copy a step.
    """
    return feature if feature.stride(-1) == 1 or feature.shape[-1] <= 1 else feature.contiguous()


def _hooked(block: nn.Module) -> bool:
    """True if someone looks at what this block returns."""
    return bool(block._forward_hooks or torch_module._global_forward_hooks)


def _shown(order: Any) -> str:
    numbers = ", ".join(map(str, list(order)[:8]))
    return f"{numbers}, ..." if len(order) > 8 else numbers or "none"
