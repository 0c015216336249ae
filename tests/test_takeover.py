"""Taking a model over and giving it back: exceptions, hooks, copies, wrapped bodies, compile."""

import copy
import pickle
import warnings

import pytest
import torch
from hosts import STEPS, assert_close, foreign_dit, inputs, reference, run, small_dit
from torch import nn

import fastcache

POLICY = fastcache.FORA(interval=3)
FULL = POLICY.full_steps(STEPS)


class Stop(Exception):
    pass


def forwards(model) -> list:
    """The forward entries of every module's instance dictionary."""
    return [module.__dict__.get("forward") for module in model.modules()]


def test_leaving_restores_the_model_exactly() -> None:
    model = small_dit()
    before, expected = forwards(model), run(model)
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model)
    assert forwards(model) == before
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))


@pytest.mark.parametrize("step", [0, 2, 3])
def test_an_exception_inside_restores_the_model_and_the_next_use_is_clean(step: int) -> None:
    model = small_dit()
    before, expected = forwards(model), run(model)

    def fail(module, args):
        raise Stop

    with pytest.raises(Stop), fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model, step)
        handle = (
            model.blocks[1].attn.register_forward_pre_hook(fail)
            if step in FULL
            else model.final_layer.register_forward_pre_hook(fail)
        )
        model(*inputs(step))
    handle.remove()
    assert forwards(model) == before and session._trunk.nbytes == 0
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    with fastcache.accelerate(model, POLICY, STEPS):
        assert_close(run(model), reference(model, FULL))


def test_an_exception_that_is_caught_inside_starts_a_new_generation() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model, 3)
        with pytest.raises(Exception):
            model(*inputs(3)[:2], torch.full((4,), 10**6))
        assert_close(run(model), reference(model, FULL))


def test_an_instance_forward_of_the_users_own_comes_back() -> None:
    model = small_dit()
    own = lambda *args: type(model).forward(model, *args)
    model.forward = own
    with fastcache.accelerate(model, POLICY, STEPS):
        assert_close(run(model), reference(model, FULL))
    assert model.__dict__["forward"] is own


def test_entering_twice_is_an_error_and_keeps_the_first() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        with pytest.raises(fastcache.SessionError, match="already entered"):
            session.__enter__()
        with pytest.raises(fastcache.SessionError, match="already accelerated"):
            fastcache.accelerate(model, POLICY, STEPS).__enter__()
        assert_close(run(model), reference(model, FULL))
    assert "forward" not in model.__dict__


def test_a_forward_that_was_replaced_inside_is_reported() -> None:
    model = small_dit()
    with pytest.raises(fastcache.HostError, match="blocks.1.forward was replaced by .*thief"):
        with fastcache.accelerate(model, POLICY, STEPS):

            def thief(*args):
                return None

            model.blocks[1].forward = thief
    assert "forward" not in model.__dict__ and "forward" not in model.blocks[0].__dict__


# -- hooks of other libraries ----------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.calls = 0


def accelerate_hook(recorder: Recorder):
    from accelerate.hooks import ModelHook

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            recorder.calls += 1
            return args, kwargs

    return Hook()


def diffusers_hook(recorder: Recorder):
    from diffusers.hooks import ModelHook

    class Hook(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            recorder.calls += 1
            return self.fn_ref.original_forward(*args, **kwargs)

    return Hook()


def attach(kind: str, module: nn.Module, recorder: Recorder) -> None:
    if kind == "accelerate":
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, accelerate_hook(recorder))
    else:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(module).register_hook(diffusers_hook(recorder), "recorder")


def detach(kind: str, module: nn.Module) -> None:
    if kind == "accelerate":
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)
    else:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(module).remove_hook("recorder", recurse=False)


@pytest.mark.parametrize("where", ["model", "block"])
@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_hooks_attached_before_stay_outside_and_go_on_working(kind: str, where: str) -> None:
    pytest.importorskip(kind)
    model, recorder = small_dit(), Recorder()
    module = model if where == "model" else model.blocks[1]
    attach(kind, module, recorder)
    hooked = module.__dict__["forward"]
    with fastcache.accelerate(model, POLICY, STEPS):
        assert module.__dict__["forward"] is hooked
        assert_close(run(model), reference(model, FULL))
    assert recorder.calls == STEPS and module.__dict__["forward"] is hooked
    run(model, 1)
    assert recorder.calls == STEPS + 1
    detach(kind, module)
    assert_close(run(model, 1), [reference(model, [0], 1)[0]])


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_hooks_attached_inside_and_removed_inside_leave_no_trace(kind: str) -> None:
    pytest.importorskip(kind)
    model, recorder = small_dit(), Recorder()
    with fastcache.accelerate(model, POLICY, STEPS):
        attach(kind, model, recorder)
        found = run(model)
        detach(kind, model)
    assert_close(found, reference(model, FULL))
    assert recorder.calls == STEPS
    assert all(torch.equal(a, b) for a, b in zip(run(model), run(small_dit()), strict=True))


@pytest.mark.parametrize("kind", ["accelerate", "diffusers"])
def test_hooks_attached_inside_may_stay_when_the_session_ends(kind: str) -> None:
    pytest.importorskip(kind)
    model, recorder = small_dit(), Recorder()
    with fastcache.accelerate(model, POLICY, STEPS):
        attach(kind, model, recorder)
        run(model)
    found = run(model)
    assert recorder.calls == 2 * STEPS
    detach(kind, model)
    expected = run(small_dit())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))


def test_torch_forward_hooks_on_blocks_see_real_tensors() -> None:
    model, seen = small_dit(), []
    model.blocks[0].register_forward_hook(
        lambda module, args, output: seen.append((type(output), output.clone()))
    )
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model)
    assert_close(found, reference(model, FULL))
    assert len(seen) == STEPS and all(kind is torch.Tensor for kind, _ in seen)


# -- hosts that look between blocks ---------------------------------------------------------------


def read_x(index, x):
    assert torch.isfinite(x).all() and x.mean() is not None
    return x


def add_out_of_place(index, x):
    return x + 0.25 * index


def add_in_place(index, x):
    x += 0.25 * index
    return x


def add_in_place_by_method(index, x):
    x.mul_(1.5).add_(0.1)
    return x


def write_a_token(index, x):
    x[:, 0] = 0.5
    return x


def write_a_view(index, x):
    view = x[:, 1:3]
    view.add_(1.0)
    return x


def through_another_shape(index, x):
    return x.reshape(-1, x.shape[-1]).unflatten(0, x.shape[:2])


class LongSkip:
    """A U-shaped host: the output of block 0 is added to that of block 2."""

    def __call__(self, index, x):
        if index == 0:
            self.kept = x
        return x + self.kept if index == 2 else x


class WriteLater:
    """Keeps block 0's output and writes it after block 1 has run; block 1's output must not change."""

    def __call__(self, index, x):
        if index == 0:
            self.kept = x
        if index == 1:
            self.kept.add_(1.0)
            return x + self.kept
        return x


@pytest.mark.parametrize(
    "between",
    [
        read_x,
        add_out_of_place,
        add_in_place,
        add_in_place_by_method,
        write_a_token,
        write_a_view,
        through_another_shape,
        LongSkip(),
        WriteLater(),
    ],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_a_host_that_looks_between_blocks_gets_exact_results(between, mode) -> None:
    model = foreign_dit(between)
    with mode():
        with fastcache.accelerate(model, POLICY, STEPS):
            found = [model(*inputs(step)) for step in range(STEPS)]
        assert_close(found, reference(model, FULL))


def test_a_tap_that_outlives_the_step_keeps_its_value() -> None:
    taps = []
    model = foreign_dit(lambda index, x: taps.append(x) or x)
    expected = []
    copy_of_model = foreign_dit(lambda index, x: expected.append(x) or x)
    with fastcache.accelerate(model, POLICY, STEPS):
        run(model)
    reference(copy_of_model, FULL)
    assert_close([tap + 0 for tap in taps], expected)


def test_writing_the_input_of_a_block_after_it_ran_is_an_error_not_a_wrong_result() -> None:
    class Meddler(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.blocks, self.final_layer = model.blocks, model.final_layer

        def forward(self, x, t, c):
            y = self.blocks[0](x, c)
            x.add_(1.0)
            for block in self.blocks[1:]:
                y = block(y, c)
            return self.final_layer(y)

    model = Meddler(foreign_dit())
    with pytest.raises(RuntimeError, match="modified in place"):
        with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
            for step in range(3):  # the third is a reuse step: x is only read when the trunk is flushed
                model(torch.randn(2, 16, 24), torch.full((2,), float(step)), torch.randn(2, 24))


def test_a_feature_that_its_module_writes_later_is_kept_as_it_was() -> None:
    model = small_dit()
    outputs = []
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: outputs.append(output))
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        found = run(model, 2)
        outputs[-1].zero_()
        with torch.no_grad():
            found.append(model(*inputs(2)))
        session.reset()
    assert_close(found, reference(model, POLICY.full_steps(STEPS), 3))


def test_features_survive_a_body_that_reuses_its_memory() -> None:
    class Static(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.buffer = body, None

        def forward(self, h):
            out = self.body(h)
            if self.buffer is None:
                self.buffer = torch.empty_like(out)
            return self.buffer.copy_(out)

    model = small_dit()
    expected = reference(model, FULL)
    for block in model.blocks:
        block.attn, block.mlp = Static(block.attn), Static(block.mlp)
    with fastcache.accelerate(model, POLICY, STEPS):
        found = []
        for step in range(STEPS):
            found += [model(*inputs(step))]
            for block in model.blocks:
                block.attn.buffer.fill_(float("nan"))
    assert_close(found, expected)


# -- branch bodies of other libraries --------------------------------------------------------------


def test_lora_wrapped_branch_bodies_work() -> None:
    peft = pytest.importorskip("peft")
    model = small_dit()
    wrapped = (
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=2, target_modules=["qkv", "fc1", "adaLN_modulation.1"], init_lora_weights=False
            ),
            model,
        )
        .eval()
        .requires_grad_(False)
    )
    assert any("lora" in name for name, _ in wrapped.named_parameters())
    with fastcache.accelerate(wrapped, POLICY, STEPS):
        found = run(wrapped)
    assert_close(found, reference(wrapped, FULL))


def test_quantised_linears_as_branch_bodies_work() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = small_dit()
        model.blocks = torch.ao.quantization.quantize_dynamic(model.blocks, {nn.Linear}, torch.qint8)
    assert not isinstance(model.blocks[0].mlp.fc1, nn.Linear)
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model)
    assert_close(found, reference(model, FULL))


# -- copies, pickles, compile ------------------------------------------------------------------------


def test_a_deep_copy_of_an_accelerated_model_is_a_plain_model_of_its_own() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        clone = copy.deepcopy(model)
        cached = run(model)
        plain = run(clone)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert_close(cached, reference(model, FULL))
    assert all(torch.equal(a, b) for a, b in zip(plain, run(model), strict=True))


def test_pickling_an_accelerated_model_says_what_to_do() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        with pytest.raises(TypeError, match="leave the accelerate"):
            pickle.dumps(model)
    pickle.dumps(model)


@pytest.mark.parametrize("order", ["compiled inside", "compiled before"])
def test_compiling_a_whole_accelerated_model_is_an_error(order: str) -> None:
    torch._dynamo.reset()
    model = small_dit()
    compiled = torch.compile(model, backend="eager")
    if order == "compiled before":
        run(compiled, 1)
    with pytest.raises(fastcache.SessionError, match="compile=True"):
        with fastcache.accelerate(model, POLICY, STEPS):
            run(compiled)
    assert "forward" not in model.__dict__


def test_accelerating_a_compile_wrapper_is_an_error() -> None:
    with pytest.raises(fastcache.HostError, match="torch.compile wrapper"):
        fastcache.accelerate(torch.compile(small_dit()), POLICY, STEPS)


def test_regional_compile_needs_two_graphs_no_breaks_and_no_recompiles() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_dit(depth=5)
    with fastcache.accelerate(model, POLICY, STEPS, compile=True):
        generations = [run(model, batch=4), run(model, batch=4), run(model, batch=6)]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2, dict(counters["stats"])
    assert not counters["graph_break"] and not counters["recompiles"], dict(counters)
    assert_close(generations[0], reference(model, FULL))
    assert_close(generations[2], reference(model, FULL, batch=6))
