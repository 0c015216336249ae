"""A host does what its adapter says, or is refused: norms, order of a block, hooks, shared modules."""

import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equal_or_loud import FULL, POLICY, StepCaching, assert_equal, cached, defined, equal_or_loud
from hosts import STEPS, ForeignBlock, ForeignDiT, foreign_dit, inputs, run, small_dit
from torch import Tensor, nn

import fastcache
from fastcache.hosts import recognise
from fastcache.schedule import Schedule, full_step, skip_step

Change = Callable[[ForeignDiT], None]


def assert_proven(model: nn.Module) -> None:
    """The session's outputs are those of the definition, or the host is refused."""
    equal_or_loud(lambda: cached(model), defined(model), fastcache.HostError)


def changed(change: Change, model: ForeignDiT | None = None) -> ForeignDiT:
    """A host of the known structure after `change`."""
    model = model or foreign_dit()
    plain = run(model, 1)[0]
    change(model)
    assert not torch.allclose(run(model, 1)[0], plain, rtol=1e-3), (
        "the change changes nothing: nothing is tested"
    )
    return model


@pytest.mark.parametrize("make", [small_dit, foreign_dit])
def test_a_host_that_does_what_its_adapter_says_is_accepted(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert_equal(cached(model), defined(model))


# -- norms ------------------------------------------------------------------------------------------


class RootMeanSquare(nn.LayerNorm):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def norm_subclass(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.norm1.__class__ = RootMeanSquare


def norm_subclass_in_one_block(model: ForeignDiT) -> None:
    model.blocks[2].norm2.__class__ = RootMeanSquare


def norm_with_an_instance_forward(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.norm2.forward = types.MethodType(
            lambda self, x: 0.5 * F.layer_norm(x, self.normalized_shape), block.norm2
        )


def norm_over_tokens_and_channels(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.norm1 = nn.LayerNorm((64, 24), elementwise_affine=False)


@pytest.mark.parametrize(
    "change",
    [norm_subclass, norm_subclass_in_one_block, norm_with_an_instance_forward, norm_over_tokens_and_channels],
)
def test_a_norm_that_is_more_than_a_layer_norm_of_channels_is_run_or_refused(change: Change) -> None:
    assert_proven(changed(change))


def test_the_same_norm_under_another_class_gives_the_same_outputs() -> None:
    class InFloat32(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    model = foreign_dit()
    for block in model.blocks:
        block.norm1.__class__ = InFloat32
    assert_proven(model)


# -- what a block does with its parts ------------------------------------------------------------------


class LayerScale(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + 0.3 * gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + 0.3 * gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Parallel(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        attended = gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + attended + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class MlpFirst(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)


class PostNorm(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.norm1(self.attn(x * (1 + scale1) + shift1))
        return x + gate2 * self.norm2(self.mlp(x * (1 + scale2) + shift2))


class ScaledBetween(ForeignBlock):
    """Something of its own between the branches, as a dropout or a token mixer would be."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = 0.9 * (x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainScale(ForeignBlock):
    """Scales by `scale`, not by 1 + scale."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * scale1 + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * scale2 + shift2)


class OtherOrderOfVectors(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + shift1 * self.attn(self.norm1(x) * (1 + gate1) + scale1)
        return x + shift2 * self.mlp(self.norm2(x) * (1 + gate2) + scale2)


class TanhGates(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1.tanh() * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2.tanh() * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ThirdBranch(ForeignBlock):
    """One branch more than the adapter knows."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) + 0.1 * x.roll(1, dims=1)


class OtherCondition(ForeignBlock):
    """The modulation is made of something else than c."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c + 0.5)


BLOCKS = [
    LayerScale,
    Parallel,
    MlpFirst,
    PostNorm,
    ScaledBetween,
    PlainScale,
    OtherOrderOfVectors,
    TanhGates,
    ThirdBranch,
    OtherCondition,
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_block_that_joins_its_parts_in_another_way_is_run_or_refused(block: type[ForeignBlock]) -> None:
    def change(model: ForeignDiT) -> None:
        for each in model.blocks:
            each.__class__ = block

    assert_proven(changed(change))


class AttentionWithWeights(nn.Module):
    """Returns (output, weights), as torch's own MultiheadAttention does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> tuple[Tensor, None]:
        return self.inner(h), None


class TakingTheFirst(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class AttentionWithPositions(nn.Module):
    """Needs more than the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        return self.inner(h + positions)


class GivingPositions(ForeignBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        positions = torch.linspace(0, 1, x.shape[1])[:, None]
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


@pytest.mark.parametrize(
    ("block", "attention"),
    [(TakingTheFirst, AttentionWithWeights), (GivingPositions, AttentionWithPositions)],
)
def test_a_body_that_takes_or_gives_more_than_one_tensor_is_refused_by_name(
    block: type[ForeignBlock], attention: type[nn.Module]
) -> None:
    model = foreign_dit()
    for each in model.blocks:
        each.__class__, each.attn = block, attention(each.attn)
    run(model, 1)  # the host itself works
    with pytest.raises(fastcache.HostError, match="attn"):
        cached(model)


def test_one_block_of_another_class_among_known_ones_is_run_or_refused() -> None:
    def change(model: ForeignDiT) -> None:
        model.blocks[2].__class__ = LayerScale

    assert_proven(changed(change))


def test_a_forward_of_the_users_own_on_a_block_is_run_or_refused() -> None:
    def change(model: ForeignDiT) -> None:
        block = model.blocks[1]
        block.forward = types.MethodType(lambda self, x, c: 0.5 * ForeignBlock.forward(self, x, c), block)

    assert_proven(changed(change))


def test_a_number_of_a_block_that_is_no_weight_is_looked_at() -> None:
    class Strength(ForeignBlock):
        strength = 1.0

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.strength * (super().forward(x, c) - x)

    def change(model: ForeignDiT) -> None:
        for block in model.blocks:
            block.__class__ = Strength
        model.blocks[3].strength = 0.25

    assert_proven(changed(change))


# -- hooks ------------------------------------------------------------------------------------------


def halved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 0.5 * output


def halved_input(module: nn.Module, args: tuple) -> tuple:
    return (0.5 * args[0] + 0.1, *args[1:])


def hook_on_a_norm(model: ForeignDiT) -> None:
    model.blocks[1].norm1.register_forward_hook(halved)


def pre_hook_on_a_norm(model: ForeignDiT) -> None:
    model.blocks[1].norm2.register_forward_pre_hook(lambda module, args: args[0] ** 3)


def hook_on_the_modulation(model: ForeignDiT) -> None:
    model.blocks[1].adaLN_modulation.register_forward_hook(halved)


def hook_on_the_linear_of_the_modulation(model: ForeignDiT) -> None:
    model.blocks[1].adaLN_modulation[1].register_forward_hook(halved)


def hook_on_a_body(model: ForeignDiT) -> None:
    model.blocks[1].mlp.register_forward_hook(halved)


def hook_on_a_block(model: ForeignDiT) -> None:
    model.blocks[1].register_forward_hook(halved)


def pre_hook_on_a_block(model: ForeignDiT) -> None:
    model.blocks[2].register_forward_pre_hook(halved_input)


HOOKS = [
    hook_on_a_norm,
    pre_hook_on_a_norm,
    hook_on_the_modulation,
    hook_on_the_linear_of_the_modulation,
    hook_on_a_body,
    hook_on_a_block,
    pre_hook_on_a_block,
]


@pytest.mark.parametrize("change", HOOKS)
def test_a_hook_that_changes_values_is_called_or_refused(change: Change) -> None:
    assert_proven(changed(change))


@pytest.mark.parametrize("change", HOOKS)
def test_a_hook_that_comes_in_the_middle_of_a_generation_is_called_or_refused(change: Change) -> None:
    model, at = foreign_dit(), 3
    definition = StepCaching(model)
    expected = [definition(step, *inputs(step)) for step in range(at)]
    for block in definition.model.blocks:  # the hook goes to the body that stands behind
        block.mlp.register_forward_hook = block.mlp.body.register_forward_hook
    change(definition.model)
    expected += [definition(step, *inputs(step)) for step in range(at, STEPS)]

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            found = [model(*inputs(step)) for step in range(at)]
            change(model)
            return found + [model(*inputs(step)) for step in range(at, STEPS)]

    equal_or_loud(play, expected, fastcache.HostError)


def test_a_hook_that_only_looks_at_a_norm_is_called_or_refused() -> None:
    model, seen = foreign_dit(), []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: seen.append(1))
    try:
        cached(model)
    except fastcache.HostError:
        return
    assert len(seen) >= len(FULL) * len(model.blocks)


def test_a_hook_on_all_modules_is_called_for_norms_or_refused() -> None:
    model = foreign_dit()

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return 0.5 * output if isinstance(module, nn.LayerNorm) else None

    with nn.modules.module.register_module_forward_hook(hook):
        assert_proven(model)


# -- one module in several places -----------------------------------------------------------------------


def listed_twice(model: ForeignDiT) -> None:
    model.blocks[2] = model.blocks[1]


def one_attention_for_all(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.attn = model.blocks[0].attn


def one_body_for_both_branches(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.mlp = block.attn


def one_modulation_for_all(model: ForeignDiT) -> None:
    for block in model.blocks:
        block.adaLN_modulation = model.blocks[0].adaLN_modulation


@pytest.mark.parametrize(
    "change", [listed_twice, one_attention_for_all, one_body_for_both_branches, one_modulation_for_all]
)
def test_a_module_that_serves_twice_has_a_feature_for_each_or_is_refused(change: Change) -> None:
    assert_proven(changed(change))


def test_a_block_that_the_host_calls_twice_has_a_feature_for_each_or_is_refused() -> None:
    class Looping(ForeignDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x, c = self.embed(x, t, y)
            for block in (*self.blocks[:2], self.blocks[1], self.blocks[0], *self.blocks[2:]):
                x = block(x, c)
            return self.finish(x, c)

    def change(model: ForeignDiT) -> None:
        model.__class__ = Looping

    assert_proven(changed(change))


def test_a_last_block_that_the_host_calls_in_the_middle_is_no_end_of_the_trunk() -> None:
    class Reversed(ForeignDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x, c = self.embed(x, t, y)
            for block in reversed(self.blocks):
                x = block(x, c)
            return self.finish(x, c)

    def change(model: ForeignDiT) -> None:
        model.__class__ = Reversed

    assert_proven(changed(change))


def test_a_block_that_a_host_leaves_out_after_the_full_step_is_left_out() -> None:
    class LeavingOut(ForeignDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x, c = self.embed(x, t, y)
            for index, block in enumerate(self.blocks):
                if index != 3 or float(t[0]) > 750:
                    x = block(x, c)
            return self.finish(x, c)

    model = foreign_dit()
    model.__class__ = LeavingOut
    definition = StepCaching(model, POLICY.full_steps(3))
    expected = definition.run(3)  # bodies are counted in order, and the last two are not asked for
    equal_or_loud(lambda: cached(model, POLICY, 3), expected)


class BackToFront(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for block in reversed(self.blocks):
            x = block(x, c)
        return self.finish(x, c)


class WithoutTheLastLater(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for block in self.blocks if float(t[0]) > 850 else self.blocks[:-1]:
            x = block(x, c)
        return self.finish(x, c)


class MoreAfterTheLast(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, c)
        return self.finish(x, c)


@pytest.mark.parametrize(
    "kind", [BackToFront, WithoutTheLastLater, MoreAfterTheLast], ids=lambda kind: kind.__name__
)
def test_a_skipped_step_has_the_output_of_the_trunk_as_the_host_ran_it(kind: type[ForeignDiT]) -> None:
    model, seen = foreign_dit(), []
    model.__class__ = kind
    layout = recognise(model).layout()
    schedule = Schedule(layout, (full_step(layout), skip_step(layout)))
    with torch.no_grad():  # the final layer of this host adds the condition of the step
        conditions = [model.embed(*inputs(step))[1][:, None] for step in range(2)]
    model.final_layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0] - conditions[len(seen) % 2])
    )
    run(model, 1)
    expected = [seen.pop()] * 2

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, schedule, calls_per_step=1):
            run(model, 2)
        return seen

    equal_or_loud(play, expected)


# -- what blocks are called with --------------------------------------------------------------------------


class ConditionWrittenBetweenBlocks(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
            c.mul_(0.5)
        return self.finish(x, c)


class ConditionOfEachBlock(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x, c = block(x, c), 0.5 * c
        return self.finish(x, c)


class ConditionInOneBuffer(ForeignDiT):
    """As under CUDA graphs: one tensor for the condition of all steps."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        if not hasattr(self, "condition"):
            self.condition = torch.empty_like(c)
        self.condition.copy_(c)
        for block in self.blocks:
            x = block(x, self.condition)
        return self.finish(x, c)


@pytest.mark.parametrize(
    "kind",
    [ConditionWrittenBetweenBlocks, ConditionOfEachBlock, ConditionInOneBuffer],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_a_condition_is_read_as_it_is_when_a_block_is_called(kind: type[ForeignDiT], mode: Callable) -> None:
    model = foreign_dit()
    model.__class__ = kind
    expected = defined(model)

    def play() -> list[Tensor]:
        with mode(), fastcache.accelerate(model, POLICY, STEPS):
            return [model(*inputs(step)).clone() for step in range(STEPS)]

    if mode is torch.inference_mode:  # PyTorch does not tell what is written there: right, or an error
        equal_or_loud(play, expected)
    else:
        assert_equal(play(), expected)


class PerToken(ForeignBlock):
    """c [B, N, D]: every token has a modulation of its own, as image-to-video models do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PerTokenDiT(ForeignDiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        each = c[:, None] * torch.linspace(0.5, 1.5, x.shape[1])[:, None]
        for block in self.blocks:
            x = block(x, each)
        return self.finish(x, c)


@pytest.mark.parametrize("size", [4, 6], ids=["16 tokens", "36 tokens"])
def test_a_condition_for_each_token_is_run_or_refused(size: int) -> None:
    model = foreign_dit()
    model.__class__ = PerTokenDiT
    for block in model.blocks:
        block.__class__ = PerToken
    expected = StepCaching(model).run(size=size)

    def play() -> list[Tensor]:
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            return [model(*inputs(step, 4, size)) for step in range(STEPS)]

    equal_or_loud(play, expected)


def test_a_condition_that_the_batch_shares_is_run_or_refused() -> None:
    class Shared(ForeignDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x, c = self.embed(x, t, y)
            for block in self.blocks:
                x = block(x, c[:1])
            return self.finish(x, c)

    model = foreign_dit()
    model.__class__ = Shared
    assert_proven(model)
