"""The reference DiT: shapes, keys, presets, checkpoints, guidance and errors."""

import pytest
import torch

from fastcache.models import PRESETS, DiT
from fastcache.models.checkpoint import Checkpoint, read_checkpoint, write_checkpoint

SMALL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def small_model(**changes: object) -> DiT:
    """A small DiT whose every parameter is random, so that nothing is the identity."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def small_inputs(batch: int = 4, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, channels, 8, 8), torch.full((batch,), 500), torch.arange(batch)


@pytest.mark.parametrize("learn_sigma, channels", [(True, 8), (False, 4)])
def test_the_output_has_the_variance_channels_only_with_learn_sigma(learn_sigma, channels):
    assert small_model(learn_sigma=learn_sigma)(*small_inputs()).shape == (4, channels, 8, 8)


def test_the_state_dict_has_the_familys_keys_and_shapes():
    state = {name: tuple(tensor.shape) for name, tensor in DiT(**SMALL).state_dict().items()}
    linears = {
        "t_embedder.mlp.0": (32, 256),
        "t_embedder.mlp.2": (32, 32),
        "final_layer.linear": (32, 32),
        "final_layer.adaLN_modulation.1": (64, 32),
    }
    for block in ("blocks.0", "blocks.1"):
        linears |= {
            f"{block}.attn.qkv": (96, 32),
            f"{block}.attn.proj": (32, 32),
            f"{block}.mlp.fc1": (128, 32),
            f"{block}.mlp.fc2": (32, 128),
            f"{block}.adaLN_modulation.1": (192, 32),
        }
    expected = {"pos_embed": (1, 16, 32), "y_embedder.embedding_table.weight": (6, 32)}
    expected |= {"x_embedder.proj.weight": (32, 4, 2, 2), "x_embedder.proj.bias": (32,)}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert state == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_published_size(name):
    depth, hidden_size, heads = {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }[name.removeprefix("DiT-").split("/")[0]]
    with torch.device("meta"):
        config = DiT.preset(name, num_classes=7).config
    assert (config.depth, config.hidden_size, config.num_heads) == (depth, hidden_size, heads)
    assert (config.patch_size, config.input_size, config.num_classes) == (int(name.split("/")[1]), 32, 7)


def test_a_fresh_model_predicts_zero_because_adaln_and_output_start_at_zero():
    assert DiT(**SMALL)(*small_inputs()).abs().max() == 0


def test_a_fresh_block_is_the_identity():
    x = torch.randn(2, 16, 32)
    assert torch.equal(DiT(**SMALL).blocks[0](x, torch.randn(2, 32)), x)


def test_every_parameter_but_the_positions_is_trained():
    model = small_model()
    model(*small_inputs()).square().sum().backward()
    without_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without_gradient == ["pos_embed"]


def test_guidance_acts_on_the_first_three_channels_and_takes_the_first_half_of_x():
    model = small_model()
    x, t, _ = small_inputs()
    y = torch.tensor([1, 2, 5, 5])
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    out = model.forward_with_cfg(x, t, y, 2.5)
    guided = (uncond + 2.5 * (cond - uncond))[:, :3]
    torch.testing.assert_close(out[:, :3], torch.cat([guided, guided]))
    torch.testing.assert_close(out[:, 3:], torch.cat([cond, uncond])[:, 3:])


@pytest.mark.parametrize("channels", [1, 3])
def test_guidance_acts_on_all_channels_of_a_model_that_has_no_more_than_three(channels):
    model = small_model(in_channels=channels, learn_sigma=False)
    x, t, y = small_inputs(channels=channels)
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    guided = uncond + 2.5 * (cond - uncond)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 2.5), torch.cat([guided, guided]))


def test_guidance_calls_a_forward_that_was_replaced_on_the_instance():
    model = small_model()
    model.forward = lambda x, t, y: torch.ones(len(x), 8, 8, 8)
    assert torch.equal(model.forward_with_cfg(*small_inputs(), 2.5), torch.ones(4, 8, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_takes_full_precision_timesteps(dtype):
    x, t, y = small_inputs()
    expected = small_model()(x, t, y)
    out = small_model().to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("wrapper", [None, "ema", "model"])
def test_a_pt_file_comes_back_exactly_with_its_shapes_inferred(tmp_path, wrapper):
    model = small_model()
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "dit.pt")
    loaded = DiT.from_checkpoint(tmp_path / "dit.pt", num_heads=4)
    assert loaded.config == model.config
    assert torch.equal(loaded(*small_inputs()), model(*small_inputs()))


def test_a_safetensors_file_comes_back_exactly_with_its_own_configuration(tmp_path):
    model = small_model(learn_sigma=False, mlp_ratio=2.0)
    write_checkpoint(
        tmp_path / "dit.safetensors", Checkpoint(model.state_dict(), model.config, {"note": "kept"})
    )
    loaded = DiT.from_checkpoint(tmp_path / "dit.safetensors")
    assert loaded.config == model.config
    assert torch.equal(loaded(*small_inputs()), model(*small_inputs()))
    assert read_checkpoint(tmp_path / "dit.safetensors").metadata["note"] == "kept"


def test_a_safetensors_file_without_metadata_is_read_by_its_shapes(tmp_path):
    from safetensors.torch import save_file

    model = small_model()
    save_file(model.state_dict(), tmp_path / "dit.safetensors")
    assert DiT.from_checkpoint(tmp_path / "dit.safetensors", num_heads=4).config == model.config


def test_the_heads_of_a_published_size_are_known(tmp_path):
    model = DiT.preset("DiT-S/8", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    assert DiT.from_checkpoint(tmp_path / "dit.pt").config == model.config


def test_the_heads_of_an_unpublished_size_must_be_given(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="^num_heads: .* depth 2 and hidden_size 32"):
        DiT.from_checkpoint(tmp_path / "dit.pt")


def test_heads_that_contradict_the_file_are_refused(tmp_path):
    model = small_model()
    write_checkpoint(tmp_path / "dit.safetensors", Checkpoint(model.state_dict(), model.config, {}))
    with pytest.raises(ValueError, match="^num_heads: .* saved with 4 heads, got 8"):
        DiT.from_checkpoint(tmp_path / "dit.safetensors", num_heads=8)


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [torch.zeros(1)]])
def test_a_file_that_holds_no_dit_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="^path: .*other.pt is not a DiT state dict"):
        DiT.from_checkpoint(tmp_path / "other.pt")


def test_a_file_with_code_in_it_is_not_executed(tmp_path):
    torch.save({"ema": small_model()}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="^path: .*pickled.pt holds more than tensors"):
        DiT.from_checkpoint(tmp_path / "pickled.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="^path: no such file: .*missing.pt"):
        DiT.from_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": 9}, "^input_size: expected a multiple of patch_size 2, got 9"),
        ({"num_heads": 5}, "^num_heads: expected a divisor of hidden_size 32, got 5"),
        ({"hidden_size": 30, "num_heads": 5}, "^hidden_size: expected a multiple of 4"),
        ({"depth": 0}, "^depth: expected at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**SMALL, **changes})


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="^name: expected one of DiT-S/2, .* got 'DiT-H/2'"):
        DiT.preset("DiT-H/2")


def test_wrong_inputs_are_named():
    model = small_model()
    x, t, y = small_inputs()
    with pytest.raises(ValueError, match=r"^x: expected \[B, 4, 8, 8\], got \[4, 4, 8, 4\]"):
        model(x[..., :4], t, y)
    with pytest.raises(ValueError, match=r"^t: expected \[4\]"):
        model(x, t[:1], y)
    with pytest.raises(ValueError, match=r"^y: expected \[4\]"):
        model(x, t, y[:, None])
    with pytest.raises(IndexError, match=r"^y: labels must lie in 0..5"):
        model(x, t, y + 4)
    with pytest.raises(ValueError, match=r"^x: expected an even batch"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 1.5)
