"""Stored features belong to the session: what a host or a sampler writes never reaches them."""

from collections.abc import Callable

import pytest
import torch
from equal_or_loud import FULL, POLICY, StepCaching, assert_equal, defined
from hosts import STEPS, ForeignDiT, foreign_dit, inputs, reference, run, small_dit
from naive_refresh import run_naively
from torch import Tensor, nn

import fastcache
from fastcache.hosts import recognise
from fastcache.schedule import REUSE, Schedule, full_step, skip_step, uniform_step

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])


def skipping(model: nn.Module) -> Schedule:
    """A full step, two skipped ones, a full one, two skipped ones."""
    layout = recognise(model).layout()
    return Schedule(layout, (full_step(layout), skip_step(layout), skip_step(layout)) * 2)


def hidden_of(model: nn.Module, steps: int = 6) -> list[Tensor]:
    """What the trunk gives to the final layer at each step; skipped steps have the last output."""
    seen: list[Tensor] = []
    handle = model.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for step in range(steps):
            model(*inputs(step))
    handle.remove()
    return [seen[step - step % 3] for step in range(steps)]


class WritingFinalLayer(nn.Module):
    """A final layer that normalises its input where it lies."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        self.seen.append(x.clone())
        x.mul_(0.5).add_(1.0)
        return self.inner(x, *more)


@MODES
def test_a_final_layer_that_writes_its_input_does_not_write_what_skipped_steps_use(mode: Callable) -> None:
    model = small_dit()
    expected = hidden_of(model)
    model.final_layer = final = WritingFinalLayer(model.final_layer)
    with mode(), fastcache.accelerate(model, skipping(model), calls_per_step=1):
        for step in range(6):
            model(*inputs(step))
    assert_equal(final.seen, expected)


@MODES
def test_a_hook_that_writes_the_last_blocks_output_does_not_write_what_skipped_steps_use(
    mode: Callable,
) -> None:
    model, seen = small_dit(), []
    expected = hidden_of(model)

    def keep_and_write(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output.clone())
        output.mul_(0.5)

    model.blocks[-1].register_forward_hook(keep_and_write)
    with mode(), fastcache.accelerate(model, skipping(model), calls_per_step=1):
        for step in range(6):
            model(*inputs(step))
    assert_equal(seen, expected)


@MODES
def test_a_sampler_that_writes_the_models_output_does_not_write_what_skipped_steps_use(
    mode: Callable,
) -> None:
    class HandingOut(ForeignDiT):
        def finish(self, x: Tensor, c: Tensor) -> Tensor:
            return x

    model = foreign_dit()
    model.__class__ = HandingOut
    with torch.no_grad():
        full = [model(*inputs(step)) for step in (0, 3)]
    found = []
    with mode(), fastcache.accelerate(model, skipping(model), calls_per_step=1):
        for step in range(6):
            output = model(*inputs(step))
            found.append(output.clone())
            output.mul_(0.5)
    assert_equal(found, [full[step // 3] for step in range(6)])


class Workspace:
    """One piece of memory that several bodies return."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def write(self, output: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = torch.empty_like(output)
        return self.buffer.copy_(output)


class InWorkspace(nn.Module):
    """A body whose output lies in a workspace, as under CUDA graphs or in an inference engine."""

    def __init__(self, body: nn.Module, workspace: Workspace) -> None:
        super().__init__()
        self.body, self.workspace = body, workspace

    def forward(self, h: Tensor) -> Tensor:
        return self.workspace.write(self.body(h))


def in_workspaces(model: nn.Module, shared: str) -> None:
    """Give every body a workspace: of its own, of its kind, or of all."""
    spaces = {"attn": Workspace(), "mlp": Workspace()}
    if shared == "by all":
        spaces["mlp"] = spaces["attn"]
    for block in model.blocks:
        if shared == "by none":
            spaces = {"attn": Workspace(), "mlp": Workspace()}
        block.attn = InWorkspace(block.attn, spaces["attn"])
        block.mlp = InWorkspace(block.mlp, spaces["mlp"])


@MODES
@pytest.mark.parametrize("shared", ["by none", "by its kind", "by all"])
def test_bodies_that_return_the_same_memory_have_features_of_their_own(mode: Callable, shared: str) -> None:
    model = small_dit()
    expected = defined(model)
    in_workspaces(model, shared)
    with mode(), fastcache.accelerate(model, POLICY, STEPS):
        found = [model(*inputs(step)) for step in range(STEPS)]
    assert_equal(found, expected)


@MODES
@pytest.mark.parametrize(
    "policy", [fastcache.TaylorSeer(interval=3, max_order=2), fastcache.FORA(interval=2)], ids=str
)
def test_a_history_of_features_is_not_one_piece_of_memory(mode: Callable, policy: fastcache.Policy) -> None:
    model = small_dit()
    expected = run_naively(model, policy.schedule(STEPS, recognise(model).layout()))
    in_workspaces(model, "by none")
    with mode(), fastcache.accelerate(model, policy, STEPS):
        found = [model(*inputs(step)) for step in range(STEPS)]
    assert_equal(found, expected, 1e-4)


@MODES
def test_two_calls_of_a_step_with_one_workspace_have_features_of_their_own(mode: Callable) -> None:
    model = small_dit()
    definition = StepCaching(model)
    calls = [(step, call) for step in range(STEPS) for call in range(2)]
    made = {(step, call): (*inputs(step)[:2], inputs(step)[2] + 3 * call) for step, call in calls}
    expected = [definition(step, *made[step, call], call=call) for step, call in calls]
    in_workspaces(model, "by none")
    with mode(), fastcache.accelerate(model, POLICY, STEPS, calls_per_step=2):
        found = [model(*made[each]) for each in calls]
    assert_equal(found, expected)


@MODES
def test_an_earlier_stream_that_a_host_keeps_is_not_changed_by_the_next_output_in_a_workspace(
    mode: Callable,
) -> None:
    class Skip:
        """A U-shaped host: the output of block 0 is added to that of block 2."""

        def __call__(self, index: int, x: Tensor) -> Tensor:
            if index == 0:
                self.kept = x
            return x + self.kept if index == 2 else x

    model = foreign_dit(Skip())
    expected = defined(model)
    in_workspaces(model, "by its kind")
    with mode(), fastcache.accelerate(model, POLICY, STEPS):
        found = [model(*inputs(step)) for step in range(STEPS)]
    assert_equal(found, expected)


@MODES
@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_a_host_that_writes_a_bodys_output_later_does_not_write_the_feature(
    mode: Callable, name: str
) -> None:
    model, outputs = small_dit(), []
    for block in model.blocks:
        getattr(block, name).register_forward_hook(lambda module, args, output: outputs.append(output))
    found = []
    with mode(), fastcache.accelerate(model, POLICY, STEPS):
        for step in range(STEPS):
            found.append(model(*inputs(step)))
            for output in outputs:
                output.zero_()
            outputs.clear()
    assert_equal(found, reference(model, FULL))


@MODES
def test_a_body_that_returns_a_weight_does_not_lend_it(mode: Callable) -> None:
    class Constant(nn.Module):
        """A body that was distilled to a constant."""

        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.randn(1, 64, 24), requires_grad=False)

        def forward(self, h: Tensor) -> Tensor:
            return self.value.expand_as(h)

    model = foreign_dit()
    model.blocks[1].mlp = constant = Constant()
    expected, weight = defined(model), constant.value.clone()
    found = []
    with mode(), fastcache.accelerate(model, POLICY, STEPS):
        for step in range(STEPS):
            if step in FULL:  # loaded for the steps that run the body, and overwritten between them
                constant.value.data.copy_(weight)
            found.append(model(*inputs(step)))
            constant.value.data.zero_()
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "policy",
    [POLICY, fastcache.ToCa(3, 0.3), fastcache.TaylorSeer(3, 2)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_features_of_inference_mode_are_used_outside_of_it_and_the_other_way_round(
    policy: fastcache.Policy, modes: tuple[Callable, Callable]
) -> None:
    model = small_dit()
    with fastcache.accelerate(model, policy, STEPS):
        expected = run(model)
    found = []
    with fastcache.accelerate(model, policy, STEPS):
        for step in range(STEPS):
            with modes[step % 2]():
                found.append(model(*inputs(step)).clone())
    with torch.inference_mode():
        assert_equal(found, expected)


class FewerTokens(ForeignDiT):
    """Blocks see streams of different length: each second token is left out half way."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)
        for index, block in enumerate(self.blocks):
            x = block(x[:, ::2] if index == 2 else x, c)
        return self.finish(x, c)


def test_each_feature_is_compared_with_the_stream_of_its_own_block() -> None:
    model = foreign_dit()
    model.__class__ = FewerTokens
    expected = defined(model)
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        found = [model(*inputs(step)) for step in range(STEPS)]
    assert_equal(found, expected)
    assert session.summary().recomputed == 0


def test_a_trunks_output_of_another_length_than_its_input_is_used_by_skipped_steps() -> None:
    model = foreign_dit()
    model.__class__ = FewerTokens
    expected, seen = hidden_of(model), []
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with fastcache.accelerate(model, skipping(model), calls_per_step=1) as session, torch.no_grad():
        for step in range(6):
            model(*inputs(step))
    assert session.summary().recomputed == 0
    with torch.no_grad():  # the final layer of this host gets the condition of the step added
        conditions = [model.embed(*inputs(step))[1][:, None] for step in range(6)]
    trunk = [hidden - conditions[step - step % 3] for step, hidden in enumerate(expected)]
    assert_equal([hidden - c for hidden, c in zip(seen, conditions, strict=True)], trunk)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_model_that_changes_its_dtype_within_a_generation_is_followed(
    dtypes: tuple[torch.dtype, ...],
) -> None:
    first, second = dtypes
    model = foreign_dit().to(first)
    layout = recognise(model).layout()
    schedule = Schedule(layout, (full_step(layout), uniform_step(layout, REUSE)))
    definition = StepCaching(foreign_dit(), [0])
    reused, full = [definition(step, *inputs(step)) for step in range(2)][1], run(foreign_dit(), 2)[1]
    assert not torch.allclose(reused, full, atol=0.1)
    with fastcache.accelerate(model, schedule, calls_per_step=1) as session, torch.no_grad():
        model(*inputs(0, dtype=first))
        found = model.to(second)(*inputs(1, dtype=second))
    assert_equal([found], [full if session.summary().recomputed else reused], 0.05)
