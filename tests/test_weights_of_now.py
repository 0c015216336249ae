"""A session computes with the weights that the host has now, however they came to change."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from equal_or_loud import POLICY, StepCaching, assert_equal, defined, equal_or_loud
from hosts import STEPS, inputs, run, small_dit
from torch import Tensor, nn

import fastcache

Change = Callable[[nn.Module], None]


def affine_dit() -> nn.Module:
    """A small DiT whose norms have weights and biases."""
    model = small_dit(depth=2)
    for block in model.blocks:
        for name in ("norm1", "norm2"):
            norm = nn.LayerNorm(32, eps=1e-6).requires_grad_(False)
            nn.init.normal_(norm.weight, 1.0, 0.3), nn.init.normal_(norm.bias, 0.0, 0.3)
            setattr(block, name, norm)
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    """The projections of the modulations."""
    return [block.adaLN_modulation[1] for block in model.blocks]


def norms(model: nn.Module) -> list[nn.LayerNorm]:
    return [norm for block in model.blocks for norm in (block.norm1, block.norm2)]


# -- changes of weights ------------------------------------------------------------------------------


def data_multiplied(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight.data.mul_(0.5)


def data_of_biases_written(model: nn.Module) -> None:
    for linear in linears(model):
        linear.bias.data.add_(0.3)


def data_copied_from_an_average(model: nn.Module) -> None:
    average = dict(small_dit(7, depth=2).named_parameters())
    for name, own in model.named_parameters():
        if name in average:
            own.data.copy_(average[name].data)


def data_replaced(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight.data = linear.weight.data * 0.5


def written_through_numpy(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight.detach().numpy()[:] *= 0.5


def written_through_a_detached_view(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight.data.view(-1)[64 * 32 :].zero_()  # gates among them


def one_row_written(model: nn.Module) -> None:
    linears(model)[1].weight.data[70] += 2.0  # a row of the attention's gate


def lora_merged_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for linear in linears(model):
            linear.weight.add_(0.1 * linear.weight.sign())


def lora_merged_into_data(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight.data += 0.1 * linear.weight.data.sign()


def weight_replaced(model: nn.Module) -> None:
    for linear in linears(model):
        linear.weight = nn.Parameter(0.5 * linear.weight, requires_grad=False)


def linear_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        block.adaLN_modulation[1] = copy.deepcopy(block.adaLN_modulation[1])
        block.adaLN_modulation[1].weight.data.mul_(0.5)


def modulation_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        linear = copy.deepcopy(block.adaLN_modulation[1])
        linear.weight.data.mul_(0.5)
        block.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)


def other_state(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: value * (1 + 0.3 * torch.randn(value.shape, generator=generator))
        for name, value in model.state_dict().items()
    }


def loaded(model: nn.Module) -> None:
    model.load_state_dict(other_state(model))


def loaded_by_assignment(model: nn.Module) -> None:
    model.load_state_dict(other_state(model), assign=True)
    model.requires_grad_(False)


def norm_weights_replaced(model: nn.Module) -> None:
    for norm in norms(model):
        norm.weight = nn.Parameter(0.5 * norm.weight, requires_grad=False)


def norm_biases_replaced(model: nn.Module) -> None:
    for norm in norms(model):
        norm.bias = nn.Parameter(norm.bias + 0.5, requires_grad=False)


def norm_data_written(model: nn.Module) -> None:
    for norm in norms(model):
        norm.weight.data.mul_(0.5)


def norm_data_replaced(model: nn.Module) -> None:
    for norm in norms(model):
        norm.weight.data = norm.weight.data * 0.5


def norms_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1 = nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)


def eps_changed(model: nn.Module) -> None:
    for norm in norms(model):
        norm.eps = 0.5


def bodies_replaced(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp = nn.Sequential(block.mlp, nn.Tanh())


def attention_wrapped(model: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, h: Tensor) -> Tensor:
            return 0.5 * self.inner(h)

    for block in model.blocks:
        block.attn = Wrapped(block.attn)


def body_weights_written(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.fc2.weight.data.mul_(0.5)


CHANGES = [
    data_multiplied,
    data_of_biases_written,
    data_copied_from_an_average,
    data_replaced,
    written_through_numpy,
    written_through_a_detached_view,
    one_row_written,
    lora_merged_in_place,
    lora_merged_into_data,
    weight_replaced,
    linear_replaced,
    modulation_replaced,
    loaded,
    loaded_by_assignment,
    norm_weights_replaced,
    norm_biases_replaced,
    norm_data_written,
    norm_data_replaced,
    norms_replaced,
    eps_changed,
    bodies_replaced,
    attention_wrapped,
    body_weights_written,
]


def after(change: Change, model: nn.Module) -> list[Tensor]:
    """A generation by the definition once `change` is done."""
    other = copy.deepcopy(model)
    before = run(other, 1)[0]
    change(other)
    expected = defined(other)
    assert not torch.allclose(expected[0], before, rtol=1e-2), "the change changes nothing: nothing is tested"
    return expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_generation_uses_the_weights_that_it_begins_with(change: Change) -> None:
    model = affine_dit()
    expected = after(change, model)
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model)
        change(model)
        found = run(model)
    assert_equal(found, expected, 2e-5)


KEPT_FROM_THE_START = [
    data_multiplied,
    loaded_by_assignment,
    norm_weights_replaced,
    norm_biases_replaced,
    norms_replaced,
    eps_changed,
    bodies_replaced,
    attention_wrapped,
]


@pytest.mark.parametrize("change", KEPT_FROM_THE_START)
def test_a_session_uses_the_weights_that_the_model_has_when_it_is_entered(change: Change) -> None:
    model = affine_dit()
    expected = after(change, model)
    session = fastcache.accelerate(model, POLICY, STEPS)
    change(model)
    with session:
        found = run(model)
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("change", [data_multiplied, loaded_by_assignment, linear_replaced])
def test_weights_that_change_between_begin_and_the_first_step_are_not_mixed_with_those_announced(
    change: Change,
) -> None:
    model = affine_dit()
    expected = after(change, model)

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS) as session:
            timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
            session.begin(timesteps=timesteps, conditions={"y": inputs(0)[2]})
            change(model)
            return run(model)

    equal_or_loud(play, expected, fastcache.SessionError, 2e-5)


@pytest.mark.parametrize(
    "change", [lora_merged_in_place, data_replaced, weight_replaced, loaded, norm_data_written]
)
@pytest.mark.parametrize("at", [3, 4], ids=["before a reuse step", "before a full step"])
def test_weights_that_change_within_a_generation_are_followed_or_refused(change: Change, at: int) -> None:
    model = affine_dit()
    definition = StepCaching(model)
    expected = [definition(step, *inputs(step)) for step in range(at)]
    changed = StepCaching(model)
    for block in changed.model.blocks:  # state-dict keys of the host itself
        block.attn, block.mlp = block.attn.body, block.mlp.body
    change(changed.model)
    later = StepCaching(changed.model)
    later._features = definition._features
    expected += [later(step, *inputs(step)) for step in range(at, STEPS)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            found = [model(*inputs(step)) for step in range(at)]
            change(model)
            return found + [model(*inputs(step)) for step in range(at, STEPS)]

    equal_or_loud(play, expected, fastcache.FastCacheError, 2e-5)


def test_weights_that_are_swapped_for_one_call_are_used_in_that_call() -> None:
    """As an evaluation with averaged weights does by torch.func.functional_call."""
    model, average = affine_dit(), affine_dit()
    data_copied_from_an_average(average)
    for norm in norms(average):
        norm.weight.data.mul_(0.5)
    weights = {**dict(average.named_parameters()), **dict(average.named_buffers())}
    expected = defined(average)
    with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
        found = [torch.func.functional_call(model, weights, inputs(step)) for step in range(STEPS)]
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_converted_between_generations_computes_in_its_new_dtype(dtype: torch.dtype) -> None:
    model = affine_dit()
    expected = defined(model)
    with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
        run(model)
        model.to(dtype)
        found = [model(*inputs(step, dtype=dtype)) for step in range(STEPS)]
    assert all(each.dtype == dtype for each in found)
    assert_equal(found, expected, 0.2)


@pytest.mark.parametrize(
    "policy", [POLICY, fastcache.ToCa(3, 0.3), fastcache.TaylorSeer(3, 2)], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("make", [affine_dit, small_dit])
def test_an_offloaded_model_gives_the_outputs_of_the_model(make: Callable, policy: fastcache.Policy) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make()
    with fastcache.accelerate(copy.deepcopy(model), policy, STEPS) as plain:
        expected = run(plain.host.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].attn.qkv.weight.is_meta
    with fastcache.accelerate(model, policy, STEPS):
        found = run(model)
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("announced", [False, True], ids=["not announced", "announced"])
def test_a_model_that_is_offloaded_within_a_session_gives_the_same_outputs(announced: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = affine_dit()
    expected = defined(model)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        if announced:
            timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
            session.begin(timesteps=timesteps, conditions={"y": inputs(0)[2]})
        found = run(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_equal(found, expected, 2e-5)


def test_a_block_that_is_replaced_within_a_session_is_followed_or_refused() -> None:
    model = small_dit(depth=2)
    other = small_dit(seed=9).blocks[1]
    twin = copy.deepcopy(model)
    twin.blocks[1] = copy.deepcopy(other)
    expected = defined(twin)

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model)
            model.blocks[1] = other
            return run(model)

    equal_or_loud(play, expected, fastcache.FastCacheError)


def test_a_block_that_is_added_within_a_session_is_followed_or_refused() -> None:
    model = small_dit(depth=2)
    other = small_dit(seed=9).blocks[1]
    twin = copy.deepcopy(model)
    twin.blocks.append(copy.deepcopy(other))
    expected = defined(twin)

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model)
            model.blocks.append(other)
            return run(model)

    equal_or_loud(play, expected, fastcache.FastCacheError)
