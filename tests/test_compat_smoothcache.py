"""SmoothCache's helpers by their own names: recorded outputs of the originals, and the originals' faults of
lifecycle (docs/methods/smoothcache.md, "Helpers and their lifecycle").
"""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

pytest.importorskip("diffusers")
from component_model import STEPS, Block, Model, generation, model, tiny_diffusers_dit, x_of
from diffusers import DiTTransformer2DModel, StableAudioDiTModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTBlock
from golden.weights import fill_model
from golden_data import CFG_SCALE, FOLDER, TOLERANCE, golden_model, load_case, relative_error
from hosts import ForeignBlock, assert_close, reference, run as run_dit, small_dit

from fastcache import HostError, ScheduleError, SessionError, SmoothCache, accelerate
from fastcache.compat.smoothcache import DiffuserCacheHelper, DiTCacheHelper, SmoothCacheHelper

SCHEDULE = [1, 0, 1, 0, 0, 1]


def helper(host: Model, schedule: dict | None = None, **options) -> SmoothCacheHelper:
    return SmoothCacheHelper(host, Block, ["attn", "mlp"], schedule or {"attn": SCHEDULE}, **options)


def expected(host: Model, flags: dict[str, list[int]], batch: int = 2) -> list[Tensor]:
    """The definition: a component's output is the stored one where its list (by name-block, or name) says
    0.
    """
    stored, outputs = {}, []
    for step in range(STEPS):
        x = x_of(step, batch)
        for index, block in enumerate(host.blocks):
            for name, body in (("attn", block.attn), ("mlp", block.mlp)):
                row = flags.get(f"{name}-{index}", flags.get(name))
                if row is None or row[step] or (name, index) not in stored:
                    stored[name, index] = body(x)
                x = x + stored[name, index].tanh()
        outputs.append(x)
    return outputs


# -- the originals' outputs -------------------------------------------------------------------------


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, json.loads(file.metadata()["config"])


@torch.no_grad()
def test_diffusers_dit_equals_the_original_at_every_step_and_in_a_second_generation() -> None:
    tensors, config = golden("smooth_dit")
    host = fill_model(DiTTransformer2DModel(**config["arch"])).eval()
    with DiffuserCacheHelper(host, config["schedule"]):
        for _ in range(2):
            found = [
                host(x, timestep=t, class_labels=tensors["class_labels"], return_dict=False)[0]
                for x, t in zip(tensors["x_in"], tensors["t"], strict=False)
            ]
            errors = [relative_error(a[:, :4], b) for a, b in zip(found, tensors["model_out"], strict=True)]
            assert max(errors) < TOLERANCE, errors
    plain = host(
        tensors["x_in"][1], timestep=tensors["t"][1], class_labels=tensors["class_labels"], return_dict=False
    )[0]
    assert (
        relative_error(plain[:, :4], tensors["model_out"][1]) > 10 * TOLERANCE
    )  # step 1 reuses: the check can fail


@torch.no_grad()
def test_stable_audio_equals_the_original_at_every_step() -> None:
    tensors, config = golden("smooth_audio")
    host = fill_model(StableAudioDiTModel(**config["arch"])).eval()
    rotary = (tensors["rotary_cos"], tensors["rotary_sin"])
    inputs = {
        "encoder_hidden_states": tensors["encoder_hidden_states"],
        "global_hidden_states": tensors["global_hidden_states"],
        "rotary_embedding": rotary,
        "return_dict": False,
    }
    with SmoothCacheHelper(host, StableAudioDiTBlock, config["components"], config["schedule"]):
        found = [host(x, t, **inputs)[0] for x, t in zip(tensors["x_in"], tensors["t"], strict=False)]
    errors = [relative_error(a, b) for a, b in zip(found, tensors["model_out"], strict=True)]
    assert max(errors) < TOLERANCE, errors
    assert (
        max(
            relative_error(a, b)
            for a, b in zip(tensors["model_out_uncached"], tensors["model_out"], strict=False)
        )
        > 10 * TOLERANCE
    )
    assert (
        relative_error(
            host(tensors["x_in"][5], tensors["t"][5], **inputs)[0], tensors["model_out_uncached"][5]
        )
        < TOLERANCE
    )


@torch.no_grad()
@pytest.mark.slow
def test_a_dit_runs_on_the_engine_and_equals_the_original() -> None:
    host, case = golden_model(), load_case("dit_smoothcache_018")
    cache = DiTCacheHelper(host, case.config["schedule"])
    cache.enable()
    errors = [
        relative_error(host.forward_with_cfg(call.x, call.t, call.y, CFG_SCALE), call.out)
        for call in case.calls()
    ]
    assert {kind: row.count for kind, row in cache.session.summary().steps.items()} == {
        "full": 24,
        "reuse": 26,
    }
    cache.disable()
    assert max(errors) < TOLERANCE, errors
    assert "forward" not in vars(host) and not any("forward" in vars(block) for block in host.blocks)


@torch.no_grad()
def test_a_dit_that_the_engine_does_not_know_has_its_components_wrapped() -> None:
    class DiTBlock(ForeignBlock):
        pass

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(DiTBlock(8) for _ in range(2))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, c)
            return x

    host, calls = Odd(), []
    host.layers[0].attn.register_forward_hook(lambda *_: calls.append(1))
    with DiTCacheHelper(host, {"attn": SCHEDULE, "mlp": SCHEDULE}) as cache:
        for step in range(STEPS):
            host(x_of(step), torch.zeros(2, 8))
        assert cache.session is None
    assert len(calls) == STEPS  # hooks still see every call
    with pytest.raises(HostError):
        DiTCacheHelper(model(), {"attn": SCHEDULE})


# -- caching -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {"attn": SCHEDULE},
        {"attn": SCHEDULE, "mlp": [1, 1, 0, 0, 0, 1]},
        {"attn": SCHEDULE, "attn-1": [1, 1, 0, 1, 0, 1]},
        {"mlp-0": SCHEDULE},
        {"attn": [0, 0, 1, 0, 1, 0]},
    ],
    ids=["one", "two", "indexed-wins", "indexed-only", "zero-first"],
)
@torch.no_grad()
def test_outputs_follow_the_schedule(flags: dict) -> None:
    host = model()
    with helper(host, flags):
        found = generation(host)
    assert all(torch.equal(a, b) for a, b in zip(found, expected(host, flags), strict=False))


@torch.no_grad()
def test_skipped_components_do_not_run() -> None:
    host, ran = model(), []
    body = host.blocks[0].attn
    body.forward = lambda x: (
        ran.append(1) or nn.functional.linear(x, body.weight, body.bias)
    )  # its own forward, counted
    with helper(host):
        generation(host)
    assert len(ran) == sum(SCHEDULE)


@torch.no_grad()
def test_attributes_and_methods_are_the_originals(tmp_path) -> None:
    host = model()
    (tmp_path / "s.json").write_text(json.dumps({"attn": SCHEDULE}))
    cache = helper(host, json.loads((tmp_path / "s.json").read_text()))
    assert cache.schedule == {"attn": SCHEDULE} and cache.components_to_wrap == ["attn", "mlp"]
    assert (
        set(cache.current_steps) == {"blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"}
        and cache.cache == {}
    )
    cache.enable()
    assert not cache.is_skip_step("blocks.0.attn")
    host(x_of(0))
    assert (
        cache.current_steps["blocks.0.attn"] == 1
        and cache.is_skip_step("blocks.0.attn")
        and not cache.is_skip_step("blocks.0.mlp")
    )
    assert cache.cache["blocks.0.attn"].shape == (2, 3, 8)
    assert set(cache.original_forwards) == set(cache.current_steps) and cache.start_steps == {}
    cache.reset_state()
    assert cache.current_steps["blocks.0.attn"] == 0 and cache.cache == {}
    cache.unwrap_components()
    cache.wrap_components()
    cache.disable()
    assert cache.original_forwards == {}


@torch.no_grad()
def test_two_calls_a_step_have_stored_outputs_of_their_own() -> None:
    host = model()
    with helper(host, calls_per_step=2):
        found = [(host(x_of(step)), host(x_of(step) + 1)) for step in range(STEPS)]
    first = expected(host, {"attn": SCHEDULE})
    assert all(torch.equal(a, b) for (a, _), b in zip(found, first, strict=False))
    assert not torch.equal(found[1][1], found[1][0])


@torch.no_grad()
def test_helper_and_engine_agree_on_an_indexed_schedule() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = {
        f"{name}-{block}": torch.randint(0, 2, (8,), generator=generator).tolist()
        for block in range(3)
        for name in ("attn", "mlp")
    }
    rows["mlp"] = rows.pop("mlp-2")
    host = small_dit()
    with SmoothCacheHelper(host, type(host.blocks[0]), ["attn", "mlp"], rows):
        wrapped = run_dit(host)
    with accelerate(host, SmoothCache(rows), 8):
        fused = run_dit(host)
    assert_close(fused, wrapped)


# -- the originals' faults ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_second_generation_starts_over_by_itself() -> None:
    host = model()
    with helper(host) as cache:
        first, second = generation(host), generation(host)
        assert cache.cache == {} and set(cache.current_steps.values()) == {0}
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=False))


@torch.no_grad()
def test_an_aborted_run_starts_over() -> None:
    host = model()
    with helper(host) as cache:
        host(x_of(0))
        host(x_of(1))
        host.fail = True
        with pytest.raises(RuntimeError, match="out of memory"):
            host(x_of(2))
        host.fail = False
        assert set(cache.current_steps.values()) == {0} and cache.cache == {}
        found = generation(host)
    assert all(torch.equal(a, b) for a, b in zip(found, expected(host, {"attn": SCHEDULE}), strict=False))


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_another_batch_in_the_middle_of_a_generation_starts_over_and_never_broadcasts(
    batch: int, caplog
) -> None:
    host = model()
    with helper(host), caplog.at_level(logging.WARNING):
        host(x_of(0))
        found = generation(host, batch)
    assert "changed" in caplog.text
    assert all(
        torch.equal(a, b) for a, b in zip(found, expected(host, {"attn": SCHEDULE}, batch), strict=False)
    )


@torch.no_grad()
def test_enabling_twice_and_disabling_restores_the_originals() -> None:
    host = model()
    before = {name: vars(module).get("forward") for name, module in host.named_modules()}
    cache = helper(host)
    cache.enable()
    cache.enable()
    cache.disable()
    cache.disable()
    assert {name: vars(module).get("forward") for name, module in host.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(generation(host), expected(host, {}), strict=False))


def test_two_helpers_on_one_model_are_refused_and_the_first_stays() -> None:
    host = model()
    with helper(host), pytest.raises(SessionError, match="cached already"):
        helper(host).enable()
    assert all("forward" not in vars(module) for module in host.modules())


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"attn1": SCHEDULE}, "'attn1' matches no branch of Model, which has attn, mlp"),
        ({"attn-7": SCHEDULE}, "attn-7"),
        ({}, "at least one key"),
        ({"attn": [1, 2]}, "expected 0"),
        ({"attn": [1, 0], "mlp": [1]}, "one length"),
    ],
)
def test_a_schedule_that_would_do_nothing_is_an_error(schedule: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        SmoothCacheHelper(model(), Block, ["attn", "mlp"], schedule)


def test_the_published_dit_schedules_are_refused_by_the_diffusers_helper() -> None:
    """The original takes them in silence and caches nothing."""
    with pytest.raises(
        ScheduleError, match="'attn', 'mlp' matches no branch of DiTTransformer2DModel, which has attn1"
    ):
        DiffuserCacheHelper(tiny_diffusers_dit(), {"attn": SCHEDULE, "mlp": SCHEDULE})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BasicTransformerBlock, ["attn1"]), "Model has no BasicTransformerBlock"),
        ((Block, ["attention"]), "expected names of attn, mlp, got attention"),
        ((Block, []), "got none"),
    ],
)
def test_blocks_and_components_that_are_not_there_are_an_error(arguments: tuple, message: str) -> None:
    with pytest.raises(HostError, match=message):
        SmoothCacheHelper(model(), *arguments, {"attn": SCHEDULE})


@torch.no_grad()
def test_nothing_is_printed(capsys) -> None:
    host = model()
    with helper(host):
        generation(host)
    assert capsys.readouterr() == ("", "")


@torch.no_grad()
def test_a_stored_output_that_someone_wrote_is_noticed() -> None:
    host = model()
    with helper(host) as cache:
        host(x_of(0))
        cache.cache["blocks.1.attn"].add_(1)
        with pytest.raises(SessionError, match="blocks.1.attn: its stored output was modified in place"):
            host(x_of(1))


@torch.no_grad()
def test_a_generation_of_another_length_is_logged(caplog) -> None:
    host = model()
    with caplog.at_level(logging.WARNING), helper(host):
        generation(host, steps=STEPS - 2)
    assert f"after {STEPS - 2} of the schedule's {STEPS} steps" in caplog.text


@torch.no_grad()
def test_the_engine_helper_starts_over_and_restores(caplog) -> None:
    host, schedule = small_dit(), [1, 0, 0, 1, 0, 1, 0, 1]
    cache = DiTCacheHelper(host, {"attn": schedule, "mlp": schedule})
    uncached = run_dit(host)
    cache.enable()
    run_dit(host, 3)
    assert set(cache.current_steps.values()) == {3} and set(cache.current_steps) == {
        f"blocks.{i}.{name}" for i in range(3) for name in ("attn", "mlp")
    }
    assert not cache.is_skip_step("blocks.1.mlp")
    cache.enable()  # starts over
    assert set(cache.current_steps.values()) == {0} and not cache.is_skip_step("blocks.1.mlp")
    run_dit(host, 1)
    assert cache.is_skip_step("blocks.1.mlp")
    cache.reset_state()
    found, again = run_dit(host), run_dit(host)
    with caplog.at_level(logging.WARNING):
        run_dit(host, 2)
        cache.disable()
    assert_close(found, reference(host, [k for k, flag in enumerate(schedule) if flag]))
    assert_close(again, found, 1e-12)
    assert "after 2 of 8 steps" in caplog.text
    assert_close(run_dit(host), uncached, 1e-12)
    with pytest.raises(ScheduleError, match="matches no branch"):
        DiTCacheHelper(host, {"attn1": schedule})
