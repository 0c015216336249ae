"""Calibration on a model: error curves from uncached runs, all branches in one launch a step."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastcache import ops
from fastcache.calibration.calibrated import Calibration
from fastcache.calibration.scan import ErrorCurves
from fastcache.engine.session import Session
from fastcache.errors import SessionError
from fastcache.hosts import Host, recognise
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import full_step
from fastcache.policies.base import positive_steps

RelativeError = Callable[[list[Tensor], list[Tensor]], Tensor]


def calibrate(
    model: nn.Module,
    run: Callable[[int], object],
    *,
    threshold: float | None = None,
    target_speedup: float | None = None,
    lookahead: int = 3,
    num_steps: int,
    samples: int = 1,
    per_layer: bool = False,
    scheduler: str | None = None,
    calls_per_step: int | None = None,
    host: type[Host] | None = None,
) -> Calibration:
    """Find a SmoothCache schedule for a sampler that calls `model`.

        run = lambda sample: pipeline(seed=sample)
        found = fastcache.calibrate(model, run, target_speedup=2.0, num_steps=50, samples=10)
        found.save("schedule.json")                 # SmoothCache.load, or SmoothCache itself, reads it
        with fastcache.accelerate(model, found.policy(), num_steps=50): ...

    Args:
        model: a model of a known family, as for accelerate.
        run: makes one generation; called with 0, 1, ..., samples - 1, for seeds or prompts.
        threshold, target_speedup: exactly one. Largest error at which a feature is reused
            (docs/methods/smoothcache.md, "Calibration"), or the ideal speedup that the smallest such
            threshold must reach.
        lookahead: most consecutive reuses.
        num_steps: model evaluations per generation.
        samples: generations whose errors are averaged.
        per_layer: one schedule per branch instead of one per branch name.
        scheduler: name of the sampler, for the fingerprint.
        calls_per_step, host: as for accelerate.

    Features are held for lookahead + 1 steps. Nothing is read from the device until the end.
    Raises ValueError naming the argument; ScheduleError if the target is out of reach;
    SessionError if a run does not have `num_steps` evaluations.
    """
    if (threshold is None) == (target_speedup is None):
        raise ValueError(
            f"threshold, target_speedup: expected exactly one of them, got {threshold} and {target_speedup}"
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold: expected a number >= 0, got {threshold!r}")
    num_steps = positive_steps(num_steps)
    if num_steps < 2:
        raise ValueError(f"num_steps: expected at least 2, got {num_steps}")
    for name, value in (("lookahead", lookahead), ("samples", samples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    found = recognise(model) if host is None else host(model)
    layout = found.layout()
    observer = ErrorObserver(layout, num_steps, min(lookahead, num_steps - 1))
    uncached = Schedule(layout, (full_step(layout),) * num_steps, "calibration")
    with Session(
        model,
        uncached,
        num_steps,
        calls_per_step=calls_per_step,
        count_ops=False,
        host=host,
        observer=observer,
        history=observer.history,
    ):
        for sample in range(samples):
            run(sample)
            observer.end_run()
    curves = observer.curves()
    if not layout.tokens and observer.tokens:
        curves = replace(curves, layout=found.layout(observer.tokens))
    if threshold is None:
        assert target_speedup is not None  # exactly one of them was given
        threshold = curves.threshold_for(target_speedup, per_layer)
    return Calibration(curves, threshold, per_layer, scheduler)


class ErrorObserver:
    """Collects the errors of every step on the device; a session calls it after every model call.

    relative_error(newest [L], earlier [K * L], k-major) -> [K, L], as fastcache.ops.relative_error.
    """

    def __init__(
        self,
        layout: Layout,
        num_steps: int,
        lookahead: int,
        relative_error: RelativeError = ops.relative_error,
    ) -> None:
        self._layout, self._num_steps, self._lookahead = layout, num_steps, lookahead
        self._relative_error = relative_error
        self._running: dict[int | str, list[Tensor]] = {}  # errors [K', L] by step, for every call of a step
        self._runs: list[dict[int | str, list[Tensor]]] = []
        self.tokens = 0

    @property
    def history(self) -> int:
        """Features per branch that the session has to keep."""
        return self._lookahead + 1

    def __call__(self, step: int, call: int | str, history: list[list[Tensor]]) -> None:
        """history[b]: features of branch b, newest first; the newest is of this step, the next of the step
        before.
        """
        steps = self._running.setdefault(call, [])
        if step != len(steps):
            raise SessionError(
                f"calibration: expected step {len(steps)} of call {call}, got {step}; a run visits every step"
                " once, in order"
            )
        reach = min(step, self._lookahead)
        if len(history) != len(self._layout.branches) or any(len(features) <= reach for features in history):
            raise SessionError(
                f"calibration: expected {reach + 1} features of each of {len(self._layout.branches)} branches"
                f" at step {step}, got {[len(features) for features in history]}"
            )
        newest = [features[0] for features in history]
        self.tokens = newest[0].shape[1] if newest[0].dim() == 3 else 0
        if reach == 0:
            steps.append(newest[0].new_empty(0, len(newest), dtype=torch.float32))
            return
        earlier = [features[k] for k in range(1, reach + 1) for features in history]
        steps.append(self._relative_error(newest, earlier))

    def end_run(self) -> None:
        """A generation is over. Raises SessionError if it was not of the announced length."""
        lengths = {call: len(steps) for call, steps in self._running.items()}
        if set(lengths.values()) != {self._num_steps}:
            raise SessionError(
                f"num_steps: expected {self._num_steps} model evaluations in a run, got"
                f" {max(lengths.values(), default=0)}"
            )
        self._runs.append(self._running)
        self._running = {}

    def curves(self) -> ErrorCurves:
        """Errors averaged over runs, and over the calls of a step. Reads the device, once."""
        recorded = [steps for run in self._runs for steps in run.values()]
        if not recorded:
            raise SessionError(
                "calibration: no run was recorded; the sampler must call the model that calibrate was given"
            )
        flat = torch.cat([errors.flatten() for steps in recorded for errors in steps]).cpu().double()
        branches = len(self._layout.branches)
        offsets, start = [], 0
        for step in range(self._num_steps):
            offsets.append(start)
            start += min(step, self._lookahead) * branches
        mean = flat.view(len(recorded), start).mean(0).tolist()

        def rows_of(branch: int) -> tuple[tuple[float, ...], ...]:
            # row j, entry i is what step i + j + 1 found about the feature j + 1 steps before it
            return tuple(
                tuple(
                    mean[offsets[i + j + 1] + j * branches + branch] for i in range(self._num_steps - 1 - j)
                )
                for j in range(self._lookahead)
            )

        return ErrorCurves(
            self._layout, tuple(rows_of(branch) for branch in range(branches)), len(self._runs)
        )
