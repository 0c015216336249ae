"""ToCa and DuCa against recorded outputs of the originals: every step, every backend, action by action."""

import pytest
import torch
from golden_data import CFG_SCALE, TOLERANCE, golden_model, load_case, relative_error
from support import available_backends

import fastcache
from fastcache.schedule import Kind

POLICIES = {"dit_toca_attention": fastcache.ToCa, "dit_duca_kvnorm": fastcache.DuCa}
FLAGS = (
    "fresh_threshold",
    "fresh_ratio",
    "cache_type",
    "ratio_scheduler",
    "soft_fresh_weight",
    "force_fresh",
)


def policy_of(name: str) -> fastcache.Policy:
    config = load_case(name).config
    return POLICIES[name](**{flag: config[flag] for flag in FLAGS}, reproduce_reference=True)


@pytest.mark.parametrize("announced", [False, True], ids=["modules", "table"])
@pytest.mark.parametrize("backend", available_backends("cpu"))
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_every_step_equals_the_original(name: str, backend: str, announced: bool) -> None:
    model, case = golden_model(), load_case(name)
    calls = list(case.calls())
    with fastcache.use_backend(backend), fastcache.accelerate(model, policy_of(name), len(calls)) as session:
        if announced:
            session.begin(timesteps=case.timesteps.float(), conditions={"y": calls[0].y})
        errors = [
            relative_error(model.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE), call.out)
            for call in calls
        ]
    assert max(errors) < TOLERANCE, errors
    assert session.summary().recomputed == 0


@pytest.mark.parametrize("name", POLICIES)
def test_every_action_is_the_originals(name: str) -> None:
    case = load_case(name)
    schedule = policy_of(name).schedule(
        int(case.config["steps"]), fastcache.hosts.recognise(golden_model()).layout()
    )
    for step, letters in zip(schedule.steps, case.actions, strict=True):
        for block, letter in enumerate(letters):
            kinds = [step.actions[index].kind for index, _ in schedule.layout.branches_of(block)]
            found = (
                "F"
                if kinds == [Kind.COMPUTE] * 2
                else "A"
                if step.skip
                else "P"
                if kinds == [Kind.REUSE, Kind.REFRESH]
                else "?"
            )
            assert found == letter, (step, block)
