"""SmoothCache's helper classes by their own names: change the import, nothing else.

Method: docs/methods/smoothcache.md, "Helpers and their lifecycle".

    from fastcache.compat.smoothcache import DiffuserCacheHelper
    helper = DiffuserCacheHelper(pipe.transformer, schedule=json.load(open("schedule.json")))
    helper.enable(); pipe(...); helper.disable()

They replace whole components of any model (norms and gates stay the host's own); for a DiT,
DiTCacheHelper runs on FastCache's engine, where a skipped component costs no norm either.
Unlike the originals, they start over by themselves when a generation ends or fails, never
broadcast a stored output, and refuse a schedule that would do nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from fastcache.compat.components import Component, Stored, Wrapping, find_components, input_form
from fastcache.compat.smoothcache_calibration import (
    CalibrationHelper,
    DiffuserCalibrationHelper,
    diffusers_block,
)
from fastcache.engine.session import Session, accelerate
from fastcache.errors import HostError, SessionError
from fastcache.hosts import recognise
from fastcache.plan.published import PublishedSchedule
from fastcache.policies import SmoothCache

__all__ = [
    "CalibrationHelper",
    "DiTCacheHelper",
    "DiffuserCacheHelper",
    "DiffuserCalibrationHelper",
    "SmoothCacheHelper",
]

log = logging.getLogger(__name__)
Source = Mapping[str, Any] | str | Path | PublishedSchedule


class SmoothCacheHelper:
    """Caches the outputs of components of a model by a schedule in the published form.

    Attributes: schedule; components_to_wrap; cache {full name: output}; current_steps {full name:
    calls in this generation}; original_forwards {full name: forward}. Where a generation is left
    without an error inside the model (a sampler that stops early), call reset_state().
    """

    def __init__(
        self,
        model: nn.Module,
        block_classes: type | Sequence[type],
        components_to_wrap: Sequence[str],
        schedule: Source,
        *,
        calls_per_step: int = 1,
    ) -> None:
        """calls_per_step: model calls per step of the schedule; 2 where guidance makes two calls, each with
        outputs of its own.

        Raises ScheduleError for a schedule that does not fit, HostError if nothing matches.
        """
        if isinstance(calls_per_step, bool) or not isinstance(calls_per_step, int) or calls_per_step < 1:
            raise ValueError(f"calls_per_step: expected a whole number >= 1, got {calls_per_step!r}")
        self.model = model
        self.components_to_wrap = list(components_to_wrap)
        self.published = PublishedSchedule.read(schedule)
        self.schedule = self.published.to_dict()
        self._components = find_components(model, block_classes, self.components_to_wrap)
        self.published.require_branches(((c.name, c.index) for c in self._components), type(model).__name__)
        self._flags = {c.full_name: self.published.flags(c.name, c.index) for c in self._components}
        self._calls_per_step = calls_per_step
        self._wrapping: Wrapping | None = None
        self.original_forwards: dict[str, Callable] = {}
        self.start_steps: dict[str, int] = {}  # the original has it, and uses it no more than we do
        self.reset_state()

    @property
    def current_steps(self) -> dict[str, int]:
        """Calls of every component in this generation, by full name."""
        return self._counts

    def reset_state(self) -> None:
        """Forget stored outputs; the next call is the first of a generation."""
        self.cache: dict[str, Any] = {}
        self._counts = {component.full_name: 0 for component in self._components}
        self._stored: dict[tuple[str, int], Stored] = {}
        self._forms: dict[str, tuple | None] = {}

    def enable(self) -> None:
        """Start caching. Enabling twice changes nothing but the state, which starts over."""
        self.reset_state()
        if self._wrapping is None:
            self.wrap_components()

    def disable(self) -> None:
        """Restore every forward and free the stored outputs. A generation that did not follow the schedule is
        logged.
        """
        enabled, steps = self._wrapping is not None, max(self._counts.values()) // self._calls_per_step
        self.unwrap_components()
        if enabled and steps:
            log.warning(
                "the last generation ended after %d of the schedule's %d steps; use a schedule for the"
                " sampler's number of steps",
                steps,
                self.published.num_steps,
            )
        self.reset_state()

    def wrap_components(self) -> None:
        """Take the components' forwards over."""
        if self._wrapping is None:
            self._wrapping = Wrapping(self.model, self._components, self._call, self.reset_state)
            self.original_forwards = dict(
                zip((c.full_name for c in self._components), self._wrapping.originals, strict=True)
            )

    def unwrap_components(self) -> None:
        """Put the components' forwards back."""
        wrapping, self._wrapping = self._wrapping, None
        self.original_forwards = {}
        if wrapping is not None:
            wrapping.restore()

    def is_skip_step(self, full_name: str) -> bool:
        """True if the next call of this component returns its stored output."""
        step, call = divmod(self._counts[full_name], self._calls_per_step)
        flags = self._flags[full_name]
        return flags is not None and flags[step] == 0 and (full_name, call) in self._stored

    def __enter__(self) -> "SmoothCacheHelper":
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def _call(
        self,
        component: Component,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = component.full_name
        form = input_form(args, kwargs)
        if self._forms.get(name, form) != form:
            log.warning(
                "%s: its input changed from %s to %s in the middle of a generation; the stored outputs were"
                " dropped and this is step 0 of a new one",
                name,
                self._forms[name],
                form,
            )
            self.reset_state()
        self._forms[name] = form
        count = self._counts[name]
        key = (name, count % self._calls_per_step)
        if self.is_skip_step(name):
            if not self._stored[key].intact():
                raise SessionError(
                    f"{name}: its stored output was modified in place after it was returned; make the block"
                    " write to a copy"
                )
            output = self._stored[key].output
        else:
            output = original(*args, **kwargs)
            self._stored[key] = Stored.of(output)
            self.cache[name] = output
        self._advance(name, count + 1)
        return output

    def _advance(self, name: str, count: int) -> None:
        """At the end of the schedule the component starts over, for the next generation."""
        if count < self.published.num_steps * self._calls_per_step:
            self._counts[name] = count
            return
        self._counts[name] = 0
        self.cache.pop(name, None)
        self._forms.pop(name, None)
        for call in range(self._calls_per_step):
            self._stored.pop((name, call), None)


class DiffuserCacheHelper(SmoothCacheHelper):
    """For diffusers' BasicTransformerBlock: attn1, or the components that are named."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Source,
        *,
        components_to_wrap: Sequence[str] = ("attn1",),
        calls_per_step: int = 1,
    ) -> None:
        super().__init__(
            model, diffusers_block(), components_to_wrap, schedule, calls_per_step=calls_per_step
        )


class DiTCacheHelper(SmoothCacheHelper):
    """For a DiT: attn and mlp of every block, on FastCache's engine.

    `session` is the running session: its summary has times and bytes; stored outputs are its own,
    `cache` and `original_forwards` stay empty. A model of the original's block class that the
    engine does not recognise has its components wrapped instead.
    """

    def __init__(self, model: nn.Module, schedule: Source) -> None:
        self.session: Session | None = None
        try:
            blocks = {type(block) for block in recognise(model).blocks}
        except HostError:
            blocks = {type(module) for module in model.modules() if type(module).__name__ == "DiTBlock"}
            if not blocks:
                raise
            self._on_engine = False
        else:
            self._on_engine = True
        super().__init__(model, tuple(blocks), ["attn", "mlp"], schedule)

    @property
    def current_steps(self) -> dict[str, int]:
        if self.session is None:
            return super().current_steps
        return dict.fromkeys(self._flags, self.session.current_step)

    def reset_state(self) -> None:
        super().reset_state()
        if self.session is not None:
            self.session.reset()

    def wrap_components(self) -> None:
        if not self._on_engine:
            super().wrap_components()
        elif self.session is None:
            session = accelerate(
                self.model, SmoothCache(self.published), self.published.num_steps, calls_per_step=1
            )
            session.__enter__()
            self.session = session

    def unwrap_components(self) -> None:
        super().unwrap_components()
        session, self.session = self.session, None
        if session is not None:
            try:
                session.__exit__(None, None, None)
            except SessionError as error:  # a generation that stopped early: the model is restored by then
                log.warning("%s", error)

    def is_skip_step(self, full_name: str) -> bool:
        if self.session is None:
            return super().is_skip_step(full_name)
        step, flags = self.current_steps[full_name], self._flags[full_name]
        return step > 0 and flags is not None and flags[step] == 0
