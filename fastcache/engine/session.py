"""Runs a plan over a host model: takes it over, tracks steps, and gives it back as it was."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastcache import backends
from fastcache.engine.index_check import raise_index_errors
from fastcache.engine.installation import Installation, installed_in, restore_all
from fastcache.engine.modulation.table import ModulationTable, build_table, checked_timesteps
from fastcache.engine.record import OperatorCount, Recorder, Summary
from fastcache.engine.trunk import Trunk
from fastcache.errors import ScheduleError, SessionError
from fastcache.hosts import Host, recognise
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan
from fastcache.policies import Policy
from fastcache.policies.base import positive_steps

Observer = Callable[[int, int, list[list[Tensor]]], None]


def accelerate(
    model: nn.Module,
    policy: Policy | Schedule,
    num_steps: int | None = None,
    *,
    calls_per_step: int | None = None,
    keep: bool = False,
    own_features: bool = False,
    feature_dtype: torch.dtype | None = None,
    compile: bool = False,
    count_ops: bool = True,
    record_tokens: bool = False,
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
        calls_per_step: model calls per step: 1, or 2 for CFG by two calls; None finds out by
            comparing t of the first two calls (one read from the device, once).
        keep: keep the features when a generation ends (they are freed otherwise).
        own_features: copy features into buffers of ours instead of keeping references; for
            bodies that return the same memory at each call.
        feature_dtype: store features in float16 or bfloat16 (or float32), in buffers of ours: half
            the memory and traffic of float32 ones, at one rounding.
        compile: compile the branch bodies (at most one graph per kind of body); a self-attention
            that gives tokens their scores runs as it is.
        count_ops: count the operators of a step of each kind, for the summary.
        record_tokens: keep which tokens every step recomputed (Session.tokens); waits for the device.
        host: adapter class for a model of an unknown family.

    Raises HostError for an unknown model, ScheduleError for a plan that does not fit it.
    """
    return Session(
        model,
        policy,
        num_steps,
        calls_per_step=calls_per_step,
        keep=keep,
        own_features=own_features,
        feature_dtype=feature_dtype,
        compile=compile,
        count_ops=count_ops,
        record_tokens=record_tokens,
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
        own_features: bool = False,
        feature_dtype: torch.dtype | None = None,
        compile: bool = False,
        count_ops: bool = True,
        record_tokens: bool = False,
        host: type[Host] | None = None,
        observer: Observer | None = None,
        history: int = 1,
    ) -> None:
        """As `accelerate`; observer is called after every model call with (step, call, features of
        every branch, newest first), of which at least `history` are kept."""
        if calls_per_step not in (None, 1, 2):
            raise ValueError(f"calls_per_step: expected 1, 2 or None (find out), got {calls_per_step!r}")
        if feature_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                "feature_dtype: expected float32, float16, bfloat16 or None (the host's own), got"
                f" {feature_dtype!r}"
            )
        self.host = recognise(model) if host is None else host(model)
        self._policy = policy
        self._declared_calls = self._calls_per_step = calls_per_step
        self._keep = keep
        self._count_ops = count_ops and not compile
        self._record_tokens = record_tokens
        self._observer, self._history = observer, history
        self.tokens: dict[int, dict[int, Tensor]] = {}
        self._trunk = Trunk(
            self.host, own_features=own_features, feature_dtype=feature_dtype, compile=compile
        )
        self._recorder = Recorder()
        self._installed: list[Installation] = []
        self._thread: int | None = None
        self._busy = False
        self._table: ModulationTable | None = None
        self._first_t: Tensor | None = None
        self._plan_generation(num_steps)

    # -- the plan ---------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The plan of the current generation."""
        return self._schedule

    def _plan_generation(self, num_steps: int | None) -> None:
        layout = self.host.layout()
        if isinstance(self._policy, Schedule):
            schedule = self._policy
            if num_steps is not None and positive_steps(num_steps) != schedule.num_steps:
                raise ScheduleError(
                    f"num_steps: the schedule has {schedule.num_steps} steps, got {num_steps}; make a"
                    f" schedule for {num_steps} steps"
                )
            _check_branches(schedule, self.host)
        elif isinstance(self._policy, Policy):
            if num_steps is None:
                raise ValueError(
                    "num_steps: expected the number of model evaluations of a generation, got None"
                )
            schedule = self._policy.schedule(positive_steps(num_steps), layout)
        else:
            raise TypeError(
                "policy: expected a Policy (such as fastcache.FORA(interval=3)) or a Schedule, got"
                f" {type(self._policy).__name__}"
            )
        self._schedule = schedule
        self._trunk.follow(schedule, self._history)
        self._step = self._call = 0

    # -- taking over and giving back ----------------------------------------------------------

    def __enter__(self) -> "Session":
        if self._installed:
            raise SessionError("this session is already entered; make another with accelerate()")
        for module in (self.host.model, *self.host.blocks):
            if installed_in(module) is not None:
                raise SessionError(
                    "the model is already accelerated by another session; leave that one first (one session"
                    " per model)"
                )
        self._thread = threading.get_ident()
        try:
            self._installed.append(Installation("", self.host.model, self._call_model))
            for index, block in enumerate(self.host.blocks):
                self._installed.append(Installation(f"blocks.{index}", block, self._block_call(index)))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        step, call, found = self._step, self._call, self._calls_per_step != self._declared_calls
        try:
            self._restore()
        finally:
            self.reset()
        raise_index_errors(self.host.model, error)
        if kind is None and (step or call):
            halves = (
                " (the first two calls had equal t and were taken for the halves of CFG; if they were two"
                " steps, pass calls_per_step=1)"
                if found and self._calls_per_step == 2
                else ""
            )
            raise SessionError(
                f"num_steps: the last generation ended after {step} of {self._schedule.num_steps}"
                f" steps{halves}, so it did not follow the plan; pass num_steps={step} (model evaluations,"
                " not scheduler steps), or call session.reset() if you stopped on purpose"
            )

    def _restore(self) -> None:
        restore_all(self._installed)

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
        CFG batch). With both, the modulations of all steps are computed here, once.
        """
        self._check_thread()
        if (timesteps is None) != (conditions is None):
            raise SessionError(
                "begin: timesteps and conditions belong together (the modulation table needs both)"
            )
        self.reset()
        self._plan_generation(self._schedule.num_steps if num_steps is None else num_steps)
        if timesteps is not None and not self._schedule.uncached:
            self._table = build_table(
                self.host, checked_timesteps(timesteps, self._schedule.num_steps), conditions
            )
            self._recorder.table_bytes = max(self._recorder.table_bytes, self._table.nbytes)

    def step(self, index: int) -> None:
        """Say which step (execution index) the next model call is; for samplers that jump."""
        if not 0 <= index < self._schedule.num_steps:
            raise SessionError(f"step: expected 0..{self._schedule.num_steps - 1}, got {index}")
        self._step, self._call = index, 0

    def reset(self) -> None:
        """End the current generation: features are freed, the next call is step 0."""
        self._step = self._call = 0
        self._table = None
        self._calls_per_step = self._declared_calls if self._calls_per_step != 2 else 2
        self._first_t = None
        self._trunk.clear()

    def summary(self) -> Summary:
        """Time, operators and bytes by step kind so far; ideal and measured speedup."""
        parameter = next(self.host.model.parameters())
        name = self._schedule.policy or "schedule"
        fields = ", ".join(f"{key}={value}" for key, value in self._schedule.fields.items())
        backend = backends.chosen_name(parameter.device, parameter.dtype)
        return self._recorder.summary(f"{name}({fields})", backend, self._schedule.ideal_speedup())

    # -- calls --------------------------------------------------------------------------------------

    def _check_thread(self) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise SessionError(
                "the model is accelerated in another thread; one session serves one thread, use a model per"
                " thread"
            )

    def _call_model(self, original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            refuse_tracing()
        self._check_thread()
        if self._busy:
            raise SessionError("the model called itself while accelerated")
        if self._schedule.uncached and self._observer is None:
            return self._measured("full", self._device(), original, args, kwargs, self._advance)
        self._find_calls_per_step(args, kwargs)
        plan = self._decide()
        self._trunk.open(plan, self._step, self._call, self._table)
        self._busy = True
        try:
            return self._measured(None, self._device(), original, args, kwargs, self._advance)
        except BaseException:
            self.reset()
            raise
        finally:
            self._busy = False

    def _measured(
        self,
        kind: str | None,
        device: torch.device,
        original: Callable,
        args: tuple,
        kwargs: dict,
        finish: Callable[[], None],
    ) -> Any:
        plan = self._schedule.steps[self._step]
        planned = kind or plan.kind
        counter = (
            OperatorCount() if self._count_ops and self._recorder.is_new(planned, plan.refreshes) else None
        )
        begun = self._recorder.start(device)
        if counter is None:
            output = original(*args, **kwargs)
        else:
            with counter:
                output = original(*args, **kwargs)
        if kind is None:
            done = self._trunk.close()
            self._recorder.recomputed += done.recomputed
            self._recorder.table_bytes = max(self._recorder.table_bytes, self._trunk.bank_nbytes)
            self._recorder.bytes_held = max(self._recorder.bytes_held, self._trunk.nbytes)
            planned = done.kind
            self._observe()
        self._recorder.stop(planned, begun, device, None if counter is None else counter.count)
        finish()
        return output

    def _observe(self) -> None:
        if self._observer is not None:
            self._observer(self._step, self._call, self._trunk.history())
        if self._record_tokens and self._call == 0:
            self.tokens[self._step] = {
                index: chosen.cpu() for index, chosen in self._trunk.chosen_tokens().items()
            }

    def _decide(self) -> StepPlan:
        planned = self._schedule.steps[self._step]
        return self._policy.decide(self._step, planned, {}) if isinstance(self._policy, Policy) else planned

    def _advance(self) -> None:
        self._call += 1
        if self._call < (self._calls_per_step or 1):
            return
        self._call = 0
        self._step += 1
        if self._step == self._schedule.num_steps:
            self._recorder.generations += 1
            self._step = 0
            self._table = None
            if not self._keep:
                self._trunk.clear()

    def _find_calls_per_step(self, args: tuple, kwargs: dict) -> None:
        """Two calls with the same t at the start of a generation are the halves of CFG."""
        if self._calls_per_step is not None:
            return
        t = self.host.timestep(args, kwargs)
        if self._first_t is None:
            self._first_t = t.detach().clone() if isinstance(t, Tensor) else torch.as_tensor(t)
            return
        same = self._first_t.shape == torch.as_tensor(t).shape and bool(
            torch.equal(self._first_t, torch.as_tensor(t))
        )
        self._first_t = None
        self._calls_per_step = 2 if same else 1
        if same:  # this is the second call of step 0
            self._step, self._call = 0, 1

    def _device(self) -> torch.device:
        return next(self.host.model.parameters()).device

    def _block_call(self, index: int) -> Callable:
        def call(original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            if torch.compiler.is_compiling():
                refuse_tracing()
            if not self._busy:
                return original(*args, **kwargs)
            return self._trunk.block(index, args, kwargs)

        return call


@torch._disable_dynamo  # torch.compiler.disable would import all of Dynamo at once
def refuse_tracing() -> None:
    """Stop torch.compile of a whole accelerated model, instead of recompiling at every step."""
    raise SessionError(
        "torch.compile traced an accelerated model: its plan changes from step to step and must stay outside"
        " of tracing. Compile the branch bodies instead, with fastcache.accelerate(model, policy, num_steps,"
        " compile=True)"
    )


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
