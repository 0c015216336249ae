"""SmoothCache's calibration helpers: published errors, averaged, and a schedule that everyone reads.

Method: docs/methods/smoothcache.md, "Calibration".
"""

import json

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from component_model import STEPS, Block, Model, call_tiny, generation, model, tiny_diffusers_dit, x_of

from fastcache import SessionError, SmoothCache
from fastcache.compat.smoothcache import CalibrationHelper, DiffuserCacheHelper, DiffuserCalibrationHelper
from fastcache.plan.published import FINGERPRINT


def rows_by_definition(outputs: list[list[list[Tensor]]], K: int) -> list[list[float]]:
    """outputs[run][block][step]."""

    def error(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().sum() / b.abs().sum())

    T = len(outputs[0][0])
    return [
        [
            sum(error(block[i], block[i + j + 1]) for run in outputs for block in run)
            / (len(outputs) * len(outputs[0]))
            for i in range(T - 1 - j)
        ]
        for j in range(K)
    ]


def measured(host: Model, shifts: list[float]) -> list[list[list[Tensor]]]:
    """attn outputs [run][block][step] of uncached runs whose inputs are shifted."""
    found = []
    for shift in shifts:
        run = [[] for _ in host.blocks]
        hooks = [
            block.attn.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out.clone()))
            for block, kept in zip(host.blocks, run, strict=False)
        ]
        for step in range(STEPS):
            host(x_of(step) + shift)
        for hook in hooks:
            hook.remove()
        found.append(run)
    return found


@pytest.mark.parametrize("shifts", [[0.0], [0.0, 0.5, 1.0]], ids=["one-run", "three-runs"])
@torch.no_grad()
def test_calibration_averages_the_published_errors_over_blocks_and_runs(
    tmp_path, shifts: list[float]
) -> None:
    host = model()
    calibration = CalibrationHelper(host, Block, ["attn"], 3, 0.6, STEPS, tmp_path / "s.json")
    calibration.enable()
    calibration.enable()
    for shift in shifts:
        for step in range(STEPS):
            host(x_of(step) + shift)
    calibration.disable()
    rows = rows_by_definition(measured(host, shifts), 3)
    assert [len(row) for row in calibration.errors["attn"]] == [5, 4, 3]
    assert all(
        a == pytest.approx(b, rel=1e-5)
        for found, row in zip(calibration.errors["attn"], rows, strict=False)
        for a, b in zip(found, row, strict=False)
    )
    assert all("forward" not in vars(module) for module in host.modules())
    assert json.loads((tmp_path / "s.json").read_text()) == calibration.schedule


@torch.no_grad()
def test_what_calibration_wrote_is_read_by_helper_policy_and_the_originals_lookup(tmp_path) -> None:
    host = tiny_diffusers_dit()
    calibration = DiffuserCalibrationHelper(
        host,
        calibration_lookahead=2,
        calibration_threshold=10.0,
        schedule_length=STEPS,
        log_file=tmp_path / "s.json",
    )
    calibration.enable()
    for step in range(STEPS):
        call_tiny(host, step)
    calibration.disable()
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["attn1"] == [1, 0, 0, 1, 0, 1] and set(written) == {"attn1", FINGERPRINT}
    assert written[FINGERPRINT]["family"] == "DiTTransformer2DModel" and written[FINGERPRINT]["layers"] == 2
    with DiffuserCacheHelper(host, written):
        for step in range(STEPS):
            call_tiny(host, step)
    assert SmoothCache(tmp_path / "s.json").published.num_steps == STEPS


@torch.no_grad()
def test_a_failed_calibration_run_is_left_out(tmp_path) -> None:
    host = model()
    calibration = CalibrationHelper(host, Block, ["attn", "mlp"], 2, 0.5, STEPS, tmp_path / "s.json")
    calibration.enable()
    host(x_of(9))
    host.fail = True
    with pytest.raises(RuntimeError):
        host(x_of(8))
    host.fail = False
    generation(host)
    calibration.disable()
    rows = rows_by_definition(measured(host, [0.0]), 2)
    assert calibration.errors["attn"][1] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.parametrize("steps", [0, STEPS - 1, STEPS + 2])
@torch.no_grad()
def test_a_calibration_of_another_length_is_an_error_and_writes_nothing(tmp_path, steps: int) -> None:
    host = model()
    calibration = CalibrationHelper(host, Block, ["attn"], 2, 0.5, STEPS, tmp_path / "s.json")
    calibration.enable()
    generation(host, steps=steps)
    with pytest.raises(SessionError, match="schedule_length: expected runs of 6"):
        calibration.disable()
    assert not (tmp_path / "s.json").exists() and all(
        "forward" not in vars(module) for module in host.modules()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("calibration_lookahead", 0), ("schedule_length", 0), ("calibration_threshold", -1.0)],
)
def test_a_bad_calibration_argument_is_named(field: str, value) -> None:
    with pytest.raises(ValueError, match=field):
        CalibrationHelper(model(), Block, ["attn"], **{field: value})
