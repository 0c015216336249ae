"""Runs a plan over a host model: takes it over, tracks steps, and gives it back as it was."""

import operator
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastcache import backends
from fastcache.backends.constants import Constants
from fastcache.backends.index_errors import IndexWatch
from fastcache.engine.calls import Arrival, Calls, Key
from fastcache.engine.device_check import DeviceCheck
from fastcache.engine.index_check import devices_of, raise_index_errors
from fastcache.engine.installation import Installation, installed_in, restore_all
from fastcache.engine.modulation.table import Announcement, checked_timesteps
from fastcache.engine.record import OperatorCount, Recorder, Summary
from fastcache.engine.trunk import Candidates, ModelCall, Trunk
from fastcache.errors import HostError, ScheduleError, SessionError
from fastcache.hosts import Host, Proof, recognise
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan
from fastcache.policies import POLICIES, Policy
from fastcache.policies.base import positive_steps

Observer = Callable[[int, Key, list[list[Tensor]]], None]


def accelerate(
    model: nn.Module,
    policy: Policy | Schedule,
    num_steps: int | None = None,
    *,
    calls_per_step: int | None = None,
    keep: bool = False,
    own_features: bool | None = None,
    feature_dtype: torch.dtype | None = None,
    compile: bool = False,
    count_ops: bool = False,
    record_tokens: bool = False,
    prove: bool = True,
    host: type[Host] | None = None,
) -> "Session":
    """Accelerate a sampler that calls `model` by `policy`; use the result as a context manager.

        with fastcache.accelerate(model, fastcache.FORA(interval=3), num_steps=50) as session:
            samples = sample(model, ...)        # nothing else changes
        print(session.summary())

    Args:
        model: a model of a known family (by structure, see fastcache.hosts).
        policy: a policy, or a Schedule.
        num_steps: model evaluations per generation (a Heun sampler of n steps makes 2n - 1).
        calls_per_step: model calls per step, such as 2 for CFG by two calls; None finds out: calls of
            a step have equal t. Where t is on a GPU it is read for that in the first generation only.
        keep: keep the features when a generation ends (they are freed otherwise).
        own_features: deprecated and without effect: features are always copied into buffers of ours.
        feature_dtype: store features in float16 or bfloat16 (or float32): half the memory and traffic
            of float32 ones, at one rounding. float16 holds nothing beyond 65,504: larger features become
            infinite, and the picture NaN; bfloat16 has float32's range.
        compile: compile the branch bodies (at most one graph per kind of body); a self-attention
            that gives tokens their scores runs as it is.
        count_ops: count the operators of a step of each kind, for the summary (by a dispatch mode
            around the first call of each kind).
        record_tokens: keep which tokens every step recomputed (Session.tokens); waits for the device.
        prove: at the first call, run one block of each structure both by its parts and by its own
            forward, and raise HostError if they differ.
        host: adapter class for a model of an unknown family.

    Raises HostError for an unknown model, ScheduleError for a plan that does not fit it.
    """
    if own_features is not None:
        warnings.warn(
            "own_features has no effect: features are always copied into buffers of FastCache's own",
            DeprecationWarning,
            stacklevel=2,
        )
    return Session(
        model,
        policy,
        num_steps,
        calls_per_step=calls_per_step,
        keep=keep,
        feature_dtype=feature_dtype,
        compile=compile,
        count_ops=count_ops,
        record_tokens=record_tokens,
        prove=prove,
        host=host,
    )


class Session:
    """One accelerated model. Made by `accelerate`."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy | Schedule,
        num_steps: int | None,
        *,
        calls_per_step: int | None = None,
        keep: bool = False,
        feature_dtype: torch.dtype | None = None,
        compile: bool = False,
        count_ops: bool = False,
        record_tokens: bool = False,
        prove: bool = True,
        host: type[Host] | None = None,
        observer: Observer | None = None,
        history: int = 1,
    ) -> None:
        """As `accelerate`; observer is called after every model call with (step, call, features of
        every branch, newest first), of which at least `history` are kept.
        """
        self._entered = True  # until everything is checked: an object that was refused is not one unused
        if feature_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                "feature_dtype: expected float32, float16, bfloat16 or None (the host's own), got"
                f" {feature_dtype!r}"
            )
        self.host = recognise(model) if host is None else host(model)
        self._blocks = self.host.blocks
        self._policy = policy
        self._decides = isinstance(policy, Policy) and _overrides_decide(policy)
        self._calls = Calls(_checked_calls(calls_per_step))
        self._keep, self._prove = keep, prove
        self._count_ops = count_ops and not compile
        self._record_tokens = record_tokens
        self._observer, self._history = observer, history
        self.tokens: dict[int, dict[int, Tensor]] = {}
        self._constants, self._watch = Constants(), IndexWatch()
        self._proof, self._check = Proof(self.host), DeviceCheck()
        self._trunk = Trunk(
            self.host, feature_dtype=feature_dtype, compile=compile, proof=self._proof, check=self._check
        )
        self._recorder = Recorder()
        self._installed: list[Installation] = []
        self._occurrences: dict[int, int] = {}  # of a block (by identity) in the call that runs
        self._bypassed = self._arrived = False
        self._thread: int | None = None
        self._busy = False
        self._name: str | None = None
        self._announcement: Announcement | None = None
        self._announced_before = False  # the announcement's generation has begun
        self._decided: dict[int, StepPlan] = {}
        self._plan_generations(num_steps)
        self._entered = False

    # -- the plan ---------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The plan of the current generation."""
        return self._schedule

    @property
    def current_step(self) -> int:
        """The step (execution index) of the last model call, or of the next one if it had all of its
        calls."""
        return self._calls.step

    def _plan_generations(self, num_steps: int | None) -> None:
        layout = self.host.layout()
        if isinstance(self._policy, Schedule):
            schedule = self._policy
            if num_steps is not None and positive_steps(num_steps) != schedule.num_steps:
                raise ScheduleError(
                    f"num_steps: the schedule has {schedule.num_steps} steps, got {num_steps}; make a"
                    f" schedule for {num_steps} steps"
                )
            _check_branches(schedule, self.host)
            self._candidates: Candidates = ()
        elif isinstance(self._policy, Policy):
            if num_steps is None:
                raise ValueError(
                    "num_steps: expected the number of model evaluations of a generation, got None"
                )
            num_steps = positive_steps(num_steps)
            schedule = self._policy.schedule(num_steps, layout)
            self._candidates = self._candidates_for(num_steps, layout)
        else:
            raise TypeError(_no_policy(self._policy))
        self._schedule = schedule
        self._trunk.follow(schedule, self._candidates, self._history)
        self._calls.plan(schedule.num_steps)

    def _candidates_for(self, num_steps: int, layout: Layout) -> Candidates:
        """What may be decided; None, anything, of a policy that decides and names nothing."""
        named = tuple(self._policy.candidates(num_steps, layout)) if isinstance(self._policy, Policy) else ()
        return None if self._decides and not named else named

    def _planned_for(self, tokens: int, arrival: Arrival) -> StepPlan:
        """The step's plan where samples have another number of tokens than the schedule was made for."""
        if not isinstance(self._policy, Policy):
            if any(action.tokens for step in self._schedule.steps for action in step.actions):
                raise ScheduleError(
                    f"schedule: it refreshes numbers of tokens of {self._schedule.layout.tokens}, the model"
                    f" now gets {tokens}; make one with policy.schedule(num_steps,"
                    f" session.host.layout({tokens})), or pass the policy itself, which plans for what it"
                    " meets"
                )
            return self._decide(arrival)
        layout = self.host.layout(tokens)
        self._schedule = self._policy.schedule(self._schedule.num_steps, layout)
        self._candidates = self._candidates_for(self._schedule.num_steps, layout)
        self._trunk.adopt(self._schedule, self._candidates, self._history)
        self._decided.clear()
        return self._decide(arrival)

    def _decide(self, arrival: Arrival) -> StepPlan:
        """What a policy says of this step, asked once a step; all of its calls follow that."""
        planned = self._schedule.steps[arrival.step]
        if not self._decides:
            return planned
        if arrival.step not in self._decided:
            self._decided.clear()
            self._decided[arrival.step] = self._checked_decision(arrival.step, planned)
        return self._decided[arrival.step]

    def _checked_decision(self, step: int, planned: StepPlan) -> StepPlan:
        assert isinstance(self._policy, Policy)
        decided = self._policy.decide(step, planned, {})
        who = f"{type(self._policy).__name__}.decide"
        if not isinstance(decided, StepPlan):
            raise ScheduleError(f"{who}: expected a StepPlan at step {step}, got {type(decided).__name__}")
        if decided.layout != self._schedule.layout:
            raise ScheduleError(
                f"{who}: the plan of step {step} was made for another layout; make it from planned.layout"
            )
        unnamed = self._trunk.supports(decided)
        if unnamed is not None:
            raise ScheduleError(
                f"{who}: at step {step} it {unnamed}, which no step of its schedule does, so nothing is"
                " kept for that; name such a step in candidates(num_steps, layout), or in schedule()"
            )
        return decided

    # -- taking over and giving back ----------------------------------------------------------

    def __enter__(self) -> "Session":
        if self._installed:
            raise SessionError("this session is already entered; make another with accelerate()")
        self._entered = True
        self._require_same_blocks()
        distinct = {id(block): block for block in self._blocks}
        for module in (self.host.model, *distinct.values()):
            if installed_in(module) is not None:
                raise SessionError(
                    "the model is already accelerated by another session; leave that one first (one session"
                    " per model)"
                )
        self._thread = threading.get_ident()
        try:
            self._watch.open(devices_of(self.host.model))
            self._installed.append(Installation("", self.host.model, self._call_model))
            for block in distinct.values():
                numbers = [number for number, other in enumerate(self._blocks) if other is block]
                self._installed.append(
                    Installation(f"blocks.{numbers[0]}", block, self._block_call(id(block), numbers))
                )
        except BaseException:
            self._restore()
            self._watch.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._calls.close()
        underway, made, per_step = self._calls.underway, self._calls.steps_made, self._calls.per_step
        try:
            self._restore()
        finally:
            self._free()
        for device in self._trunk.devices:
            self._watch.add(device)
        raise_index_errors(self._watch, error)
        if kind is not None:
            return
        self._calls.check()
        self._check.read()
        if self._bypassed and not self._arrived:
            raise SessionError(
                "model: its blocks ran, but its own call went around the session (type(model).forward, or a"
                " forward that was taken before), so nothing was cached; call the model itself"
            )
        if underway:
            raise SessionError(self._incomplete(made, per_step))

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                "accelerate() was called and its result never used: it is a context manager, and nothing was"
                " accelerated. Write: with fastcache.accelerate(model, policy, num_steps): ...",
                UserWarning,
                stacklevel=2,
            )

    def _incomplete(self, made: int, per_step: int | None) -> str:
        several = (
            f" ({per_step or 'several'} calls with equal t were taken for one step, as the halves of CFG; if"
            " they were steps, pass calls_per_step=1)"
            if per_step != 1 and self._calls.found_by_itself
            else ""
        )
        return (
            f"num_steps: the last generation ended after {made} of {self._schedule.num_steps}"
            f" steps{several}, so it did not follow the plan; pass num_steps={made} (model evaluations, not"
            " scheduler steps) if that is its length, or call session.reset() if you stopped on purpose"
        )

    def _restore(self) -> None:
        restore_all(self._installed)

    def _free(self) -> None:
        """Everything that a generation holds."""
        self._announcement = None
        self._decided.clear()
        self._trunk.clear()
        self._constants.clear()
        self._name = None

    # -- generations ----------------------------------------------------------------------------

    def begin(
        self,
        num_steps: int | None = None,
        *,
        timesteps: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
    ) -> None:
        """Start a generation, knowing more about it.

        num_steps: model evaluations, if other than before. timesteps: [S], the t that the model
        gets at each step; conditions: its other inputs by name (a DiT: y, labels [B] of the whole
        CFG batch). With both, the modulations of all steps are computed here, once; what the model
        gets is compared with them at every step.
        """
        self._check_thread()
        if (timesteps is None) != (conditions is None):
            raise SessionError(
                "begin: timesteps and conditions belong together (the modulation table needs both)"
            )
        self.reset()
        self._plan_generations(self._schedule.num_steps if num_steps is None else num_steps)
        if timesteps is not None and conditions is not None and not self._runs_untouched():
            steps = checked_timesteps(timesteps, self._schedule.num_steps)
            self._announcement = Announcement(self.host, steps, conditions)
            self._announced_before = False
            self._note_table()

    def step(self, index: int) -> None:
        """Say which step (execution index) the next model call is; for samplers that jump."""
        if isinstance(index, bool) or not 0 <= operator.index(index) < self._schedule.num_steps:
            raise SessionError(f"step: expected 0..{self._schedule.num_steps - 1}, got {index}")
        self._calls.jump(operator.index(index))

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Model calls in this context are the step's call `name` ("cond", "uncond", ...).

        A name that comes again begins the next step, so steps may have different calls (a guidance
        interval, skip-layer guidance); features are kept by name.
        """
        if not isinstance(name, str) or not name:
            raise SessionError(f"call: expected a name such as 'cond', got {name!r}")
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    def reset(self) -> None:
        """End the current generation: features are freed, the next call is step 0."""
        self._calls.forget()
        self._free()

    def summary(self) -> Summary:
        """Time, operators and bytes by step kind so far; ideal and measured speedup."""
        parameter = next(self.host.model.parameters())
        name = self._schedule.policy or "schedule"
        fields = ", ".join(f"{key}={value}" for key, value in self._schedule.fields.items())
        backend = backends.chosen_name(parameter.device, parameter.dtype)
        return self._recorder.summary(
            f"{name}({fields})",
            backend,
            self._schedule.ideal_speedup(),
            self._calls.generations,
            self._calls.restarted,
            self._proof.unproven,
        )

    # -- calls --------------------------------------------------------------------------------------

    def _check_thread(self) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise SessionError(
                "the model is accelerated in another thread; one session serves one thread, use a model per"
                " thread"
            )

    def _runs_untouched(self) -> bool:
        """A plan that reuses nothing leaves the host alone."""
        return self._schedule.uncached and self._observer is None and not self._decides

    def _require_same_blocks(self) -> None:
        now = self.host.blocks
        if len(now) != len(self._blocks) or any(a is not b for a, b in zip(now, self._blocks, strict=False)):
            raise SessionError(
                "blocks: the model's blocks were replaced since accelerate(); leave the session and"
                " accelerate the model as it is now"
            )

    def _call_model(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            refuse_tracing()
        self._check_thread()
        if self._busy:
            raise SessionError("the model called itself while accelerated")
        self._require_same_blocks()
        t = self.host.timestep(args, kwargs)
        try:
            arrival = self._calls.arrive(t, self._name)
        except BaseException:
            self._give_up()
            raise
        self._arrived = self._busy = True
        self._occurrences.clear()
        try:
            with self._constants.in_use():
                return self._run(arrival, t, original, args, kwargs)
        except BaseException:
            self._give_up()
            raise
        finally:
            self._busy = False

    def _run(
        self,
        arrival: Arrival,
        t: Any,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        device = self._device()
        if arrival.opens:
            self._begin_generation()
        if self._runs_untouched():
            output = self._measured(self._schedule.steps[arrival.step], device, original, args, kwargs)
        else:
            if self._announcement is not None:
                self._announcement.require_time(arrival.step, t)
            plan = self._decide(arrival)
            self._trunk.open(
                ModelCall(
                    plan,
                    arrival.step,
                    arrival.call,
                    self._announcement,
                    self.host.sample(args, kwargs) if self._trunk.draws else None,
                    lambda tokens: self._planned_for(tokens, arrival),
                    prove=self._prove and arrival.opens,
                )
            )
            output = self._measured(plan, device, original, args, kwargs, cached=True)
            self._observe(arrival)
        if self._calls.leave():
            self._end_generation()
        return output

    def _begin_generation(self) -> None:
        self._recorder.begin()
        self._check.begin()
        self._decided.clear()
        self._trunk.begin_generation()
        if self._announcement is not None:
            if self._announced_before:
                self._announcement = None  # it was of the generation that was given up
            else:
                self._announced_before = True
                self._announcement.refresh(self._check)
                self._note_table()

    def _end_generation(self) -> None:
        self._trunk.end_generation()
        self._announcement = None
        if not self._keep:
            self._trunk.clear()

    def _give_up(self) -> None:
        """A call failed: its generation is over."""
        self._calls.forget(failed=True)
        self._announcement = None
        self._decided.clear()
        self._trunk.clear()

    def _note_table(self) -> None:
        nbytes = 0 if self._announcement is None else self._announcement.table.nbytes
        self._recorder.table_bytes = max(self._recorder.table_bytes, nbytes)

    def _measured(
        self,
        plan: StepPlan,
        device: torch.device,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cached: bool = False,
    ) -> Any:
        kind = plan.kind
        counting = self._count_ops and self._recorder.is_new(kind, plan.refreshes)
        counter = OperatorCount() if counting else None
        begun = self._recorder.start(device)
        if counter is None:
            output = original(*args, **kwargs)
        else:
            with counter:
                output = original(*args, **kwargs)
        if cached:
            outcome = self._trunk.close()
            self._recorder.recomputed += outcome.recomputed
            self._recorder.table_bytes = max(self._recorder.table_bytes, self._trunk.bank_nbytes)
            self._recorder.bytes_held = max(self._recorder.bytes_held, self._trunk.nbytes)
            kind = outcome.kind
        self._recorder.stop(kind, begun, device, None if counter is None else counter.count)
        return output

    def _observe(self, arrival: Arrival) -> None:
        if self._observer is not None:
            self._observer(arrival.step, arrival.call, self._trunk.history())
        if self._record_tokens and arrival.first:
            self.tokens[arrival.step] = {
                index: chosen.cpu() for index, chosen in self._trunk.chosen_tokens().items()
            }

    def _device(self) -> torch.device:
        return next(self.host.model.parameters()).device

    def _block_call(self, block: int, numbers: list[int]) -> Callable[..., Any]:
        """The forward of a block, which stands at these places of the trunk."""

        def call(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if torch.compiler.is_compiling():
                refuse_tracing()
            if not self._busy:
                self._bypassed = True
                return original(*args, **kwargs)
            if self._runs_untouched():
                return original(*args, **kwargs)
            occurrence = self._occurrences.get(block, 0)
            self._occurrences[block] = occurrence + 1
            if occurrence == len(numbers):
                raise HostError(
                    f"blocks[{numbers[0]}]: the model called it more often than the {len(numbers)} time(s)"
                    " that it stands in its blocks, so its features cannot be told apart; list it once for"
                    " every time that it runs"
                )
            return self._trunk.block(numbers[occurrence], original, args, kwargs)

        return call


@torch._disable_dynamo  # torch.compiler.disable would import all of Dynamo at once
def refuse_tracing() -> None:
    """Stop torch.compile of a whole accelerated model, instead of recompiling at every step."""
    raise SessionError(
        "torch.compile traced an accelerated model: its plan changes from step to step and must stay outside"
        " of tracing. Compile the branch bodies instead, with fastcache.accelerate(model, policy, num_steps,"
        " compile=True)"
    )


def _checked_calls(calls_per_step: int | None) -> int | None:
    if calls_per_step is None:
        return None
    if not isinstance(calls_per_step, (bool, float)) and hasattr(calls_per_step, "__index__"):
        number = operator.index(calls_per_step)
        if number >= 1:
            return number
    raise ValueError(
        "calls_per_step: expected a whole number of model calls >= 1, or None (find out), got"
        f" {calls_per_step!r}"
    )


def _overrides_decide(policy: Policy) -> bool:
    return type(policy).decide is not Policy.decide or "decide" in vars(policy)


def _no_policy(given: object) -> str:
    expected = "policy: expected a Policy (such as fastcache.FORA(interval=3)) or a Schedule, got "
    if isinstance(given, str):
        known = POLICIES.get(given.lower())
        return expected + f"{given!r}" + (f"; write fastcache.{known.__name__}(...)" if known else "")
    if isinstance(given, type) and issubclass(given, Policy):
        return expected + f"the class itself; write fastcache.{given.__name__}(...)"
    return expected + type(given).__name__


def _check_branches(schedule: Schedule, host: Host) -> None:
    """A schedule that matches no branch of the host must never be a silent no-op."""
    layout = host.layout()
    wanted = [(branch.block, branch.name) for branch in schedule.layout.branches]
    present = [(branch.block, branch.name) for branch in layout.branches]
    if wanted == present:
        return
    matched = len(set(wanted) & set(present))
    raise ScheduleError(
        f"schedule: it has branches {', '.join(schedule.layout.names)} in {schedule.layout.depth} blocks"
        f" ({schedule.layout.family}), the model has {', '.join(layout.names)} in {layout.depth} blocks"
        f" ({layout.family}); {matched} of {len(wanted)} match. Make the schedule for this model's layout:"
        " policy.schedule(num_steps, session.host.layout())"
    )
