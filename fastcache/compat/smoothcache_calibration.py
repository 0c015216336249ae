"""SmoothCache's calibration helpers: error curves of components of any model.

Method: docs/methods/smoothcache.md, "Calibration".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.calibration.scan import greedy_schedule
from fastcache.compat.components import Component, Wrapping, find_components
from fastcache.errors import SessionError
from fastcache.extras import needs_extra
from fastcache.plan.published import Fingerprint, PublishedSchedule
from fastcache.version import __version__


class CalibrationHelper:
    """Measures the components of a model while a pipeline runs, and writes a schedule at disable().

    Runs may be several: their errors are averaged. One that fails is left out. Errors stay on the
    device until disable(). After disable(), `schedule` is what was written, and `errors`
    {component: rows} what it follows from.
    """

    def __init__(
        self,
        model: nn.Module,
        block_classes: type | Sequence[type],
        components_to_wrap: Sequence[str],
        calibration_lookahead: int = 3,
        calibration_threshold: float = 0.0,
        schedule_length: int = 50,
        log_file: str | Path = "calibration_schedule.json",
    ) -> None:
        """Names as in the original: K, alpha, T, and the JSON file to write. Raises ValueError, HostError."""
        for name, value in (
            ("calibration_lookahead", calibration_lookahead),
            ("schedule_length", schedule_length),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if not calibration_threshold >= 0:
            raise ValueError(f"calibration_threshold: expected a number >= 0, got {calibration_threshold!r}")
        self.model = model
        self.components_to_wrap = list(components_to_wrap)
        self.calibration_lookahead = calibration_lookahead
        self.calibration_threshold = calibration_threshold
        self.schedule_length = schedule_length
        self.log_file = log_file
        self.schedule: dict[str, Any] = {}
        self.errors: dict[str, list[list[float]]] = {}
        self._components = find_components(model, block_classes, self.components_to_wrap)
        self._wrapping: Wrapping | None = None
        self.reset_state()

    def reset_state(self) -> None:
        """Forget everything that was measured."""
        self._finished: dict[str, list[list[Tensor]]] = {
            component.full_name: [] for component in self._components
        }
        self._drop_run()

    def enable(self) -> None:
        """Start measuring. Enabling twice changes nothing."""
        if self._wrapping is None:
            self.reset_state()
            self._wrapping = Wrapping(self.model, self._components, self._call, self._drop_run)

    def disable(self) -> None:
        """Restore every forward, and write the schedule.

        Raises SessionError, and writes nothing, if no run of schedule_length steps was seen or the
        last one is incomplete.
        """
        wrapping, self._wrapping = self._wrapping, None
        if wrapping is None:
            return
        wrapping.restore()
        started = max((len(rows) for rows in self._running.values()), default=0)
        try:
            if started or not all(self._finished.values()):
                raise SessionError(
                    f"schedule_length: expected runs of {self.schedule_length} calls of every component, got"
                    f" {started} calls in the last one; pass the number of model evaluations of a generation"
                )
            self._write()
        finally:
            self.reset_state()

    def __enter__(self) -> "CalibrationHelper":
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.disable()
        elif self._wrapping is not None:
            self._wrapping.restore()
            self._wrapping = None

    def _drop_run(self) -> None:
        """The running generation failed: its errors are not counted, the next call is step 0."""
        self._kept: dict[str, list[Tensor]] = {component.full_name: [] for component in self._components}
        self._running: dict[str, list[Tensor]] = {component.full_name: [] for component in self._components}
        complete = min((len(runs) for runs in self._finished.values()), default=0)
        for runs in self._finished.values():
            del runs[complete:]

    def _call(
        self,
        component: Component,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        output = original(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise SessionError(
                f"{component.full_name}: expected a tensor to measure, got {type(output).__name__}; leave"
                f" {component.name} out of components_to_wrap"
            )
        name = component.full_name
        kept, running = self._kept[name], self._running[name]
        if kept and kept[0].shape != output.shape:
            raise SessionError(
                f"{name}: its output changed from {list(kept[0].shape)} to {list(output.shape)} in the middle"
                f" of a run of {self.schedule_length} steps; check schedule_length"
            )
        newest = output.detach().float()
        size = newest.abs().sum()
        running.append(
            torch.stack([(earlier.float() - newest).abs().sum() / size for earlier in kept])
            if kept
            else newest.new_empty(0)
        )
        kept.insert(0, output.detach().clone())
        del kept[self.calibration_lookahead :]
        if len(running) == self.schedule_length:
            self._finished[name].append(running)
            self._running[name], self._kept[name] = [], []
        return output

    def _write(self) -> None:
        self.errors = {
            name: self._mean_rows([c for c in self._components if c.name == name])
            for name in self.components_to_wrap
        }
        entries = tuple(
            (name, tuple(greedy_schedule(rows, self.calibration_threshold)))
            for name, rows in self.errors.items()
        )
        blocks = {component.full_name.rpartition(".")[0] for component in self._components}
        made = Fingerprint(
            type(self.model).__name__,
            len(blocks),
            tuple(self.components_to_wrap),
            self.schedule_length,
            None,
            self.calibration_threshold,
            self.calibration_lookahead,
            __version__,
        )
        published = PublishedSchedule(entries, made)
        self.schedule = published.to_dict()
        published.save(self.log_file)

    def _mean_rows(self, components: list[Component]) -> list[list[float]]:
        """E_j[i] over all blocks and runs: what step i + j + 1 found about the output j + 1 steps before
        it.
        """
        runs = [steps for component in components for steps in self._finished[component.full_name]]
        flat = torch.stack([torch.cat(steps) for steps in runs]).cpu().double().mean(0).tolist()
        starts = [0]
        for step in range(self.schedule_length):
            starts.append(starts[-1] + min(step, self.calibration_lookahead))
        return [
            [flat[starts[i + j + 1] + j] for i in range(max(0, self.schedule_length - 1 - j))]
            for j in range(self.calibration_lookahead)
        ]


class DiffuserCalibrationHelper(CalibrationHelper):
    """For diffusers' BasicTransformerBlock: attn1 unless components are named."""

    def __init__(
        self,
        model: nn.Module,
        calibration_lookahead: int = 3,
        calibration_threshold: float = 0.0,
        schedule_length: int = 50,
        log_file: str | Path = "calibration_schedule.json",
        components_to_wrap: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            model,
            diffusers_block(),
            components_to_wrap or ["attn1"],
            calibration_lookahead,
            calibration_threshold,
            schedule_length,
            log_file,
        )


def diffusers_block() -> type[nn.Module]:
    """diffusers' block class of DiT, PixArt and relatives."""
    with needs_extra("diffusers"):
        from diffusers.models.attention import BasicTransformerBlock
    return BasicTransformerBlock
