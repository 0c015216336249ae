"""The SmoothCache schedules of a frontier: one calibration, a threshold for each target."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcache.calibration.calibrated import Calibration
from fastcache.calibration.errors import calibrate
from fastcache.calibration.scan import ErrorCurves
from fastcache.files.damaged import set_aside
from fastcache.files.json_text import read_json
from fastcache.files.whole import write_text_whole
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.plan.layout import Layout
from fastcache.workshop.studies.comparison import Sampler
from fastcache.workshop.studies.frontier.grid import Calibrated

LOOKAHEAD = 3
CLASSES_PER_RUN = 9
RUNS = 4  # together one picture of each class


def error_curves(
    model: DiT, sampler: Sampler, path: Path, fingerprint: str, first_picture: int
) -> ErrorCurves:
    """Measured on pictures from `first_picture` on, which are not those that are judged; kept in `path`.

    A file of the same fingerprint is read instead.
    """
    layout = recognise(model).layout()
    if path.exists():
        try:
            found = _kept(path, layout, fingerprint)
        except ValueError as error:
            set_aside(path, error)
        else:
            if found is not None:
                return found

    one_batch = replace(sampler, batch_size=CLASSES_PER_RUN)

    def run(generation: int) -> None:
        first = first_picture + generation * CLASSES_PER_RUN
        one_batch.run(model, range(first, first + CLASSES_PER_RUN), None)

    curves = calibrate(
        model,
        run,
        threshold=0.0,
        lookahead=LOOKAHEAD,
        samples=RUNS,
        num_steps=sampler.steps,
        scheduler=sampler.scheduler,
        calls_per_step=1,
    ).curves
    text = json.dumps({"fingerprint": fingerprint, "samples": curves.samples, "errors": curves.errors})
    write_text_whole(path, text)
    return curves


def _kept(path: Path, layout: Layout, fingerprint: str) -> ErrorCurves | None:
    """The curves in a file; None if it is of another fingerprint, ValueError if it is damaged."""
    found: Any = read_json(path)
    try:
        if found["fingerprint"] != fingerprint:
            return None
        errors = tuple(tuple(tuple(map(float, row)) for row in rows) for rows in found["errors"])
        return ErrorCurves(layout, errors, int(found["samples"]))
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a calibration of this version: {error}") from error


def calibrated(curves: ErrorCurves, target: Calibrated, sampler: Sampler) -> Calibration:
    """The schedule with the target's speedup. Raises ScheduleError if it is out of reach."""
    threshold = curves.threshold_for(target.target_speedup, target.per_layer)
    return Calibration(curves, threshold, target.per_layer, sampler.scheduler)
