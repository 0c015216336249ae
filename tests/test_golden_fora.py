"""FORA against recorded outputs of the original: every step, every backend."""

import pytest
import torch
from golden_data import CFG_SCALE, TOLERANCE, golden_model, load_case
from support import available_backends

import fastcache

CASE = "dit_fora_n3"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("announced", [False, True], ids=["modules", "table"])
@pytest.mark.parametrize("backend", available_backends("cpu"))
@torch.no_grad()
def test_every_step_equals_the_original(backend: str, announced: bool) -> None:
    model, case = golden_model(), load_case(CASE)
    calls = list(case.calls())
    with (
        fastcache.use_backend(backend),
        fastcache.accelerate(model, fastcache.FORA(interval=int(case.config["N"])), len(calls)) as session,
    ):
        if announced:
            session.begin(timesteps=case.timesteps.float(), conditions={"y": calls[0].y})
        errors = [
            relative_error(model.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE), call.out)
            for call in calls
        ]
    assert max(errors) < TOLERANCE, errors
    assert session.summary().steps["reuse"].count > 0
