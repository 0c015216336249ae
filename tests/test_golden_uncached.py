"""The reference DiT computes what the original family computes."""

import torch
from golden_data import CFG_SCALE, TOLERANCE, golden_model, load_case, relative_error


def test_every_step_of_the_uncached_run_matches_the_original():
    model = golden_model()
    with torch.inference_mode():
        errors = [
            relative_error(model.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE), call.out)
            for call in load_case("dit_uncached").calls()
        ]
    assert len(errors) == 50
    assert max(errors) < TOLERANCE


def test_a_wrong_timestep_would_be_noticed():
    call = next(load_case("dit_uncached").calls())
    with torch.inference_mode():
        out = golden_model().forward_with_cfg(call.x, call.t - 1, call.y, CFG_SCALE)
    assert relative_error(out, call.out) > 10 * TOLERANCE
