"""Refreshes, forecasts and skips in the engine, against the method written naively."""

import pytest
import torch
from hosts import CLASSES, STEPS, assert_close, inputs, run, small_dit
from naive_refresh import run_naively
from support import available_backends
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache.engine.record import OperatorCount
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.schedule import (
    COMPUTE,
    REUSE,
    Schedule,
    Score,
    Selection,
    StepPlan,
    full_step,
    refresh,
    uniform_step,
)

SCORES = [score.value for score in Score]


@pytest.fixture(params=available_backends("cpu"))
def backend(request):
    with fastcache.use_backend(request.param):
        yield request.param


def partial_schedule(
    model: nn.Module, score: str, tokens: tuple[int, ...] = (5, 0, 7), cell: int = 2
) -> Schedule:
    """Full, three partial steps, full, three partial steps; the MLP of block b refreshes tokens[b]."""
    layout = recognise(model).layout()
    partial = StepPlan(
        layout,
        tuple(
            REUSE if branch.name == "attn" else refresh(tokens[branch.block]) for branch in layout.branches
        ),
    )
    return Schedule(
        layout,
        (full_step(layout), partial, partial, partial) * 2,
        selection=Selection(score, 0.1, cell, 0.6 if cell else 0.0),
    )


@pytest.mark.parametrize("cell", [0, 2])
@pytest.mark.parametrize("score", SCORES)
def test_partial_steps_equal_the_method_written_naively(backend, score: str, cell: int) -> None:
    model = small_dit()
    schedule = partial_schedule(model, score, cell=cell)
    expected = run_naively(model, schedule)
    with fastcache.accelerate(model, schedule):
        found = run(model)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize(
    "policy",
    [
        fastcache.ToCa(fresh_threshold=3, fresh_ratio=0.3),
        fastcache.ToCa(
            fresh_threshold=4, fresh_ratio=0.3, ratio_scheduler="ToCa-ddpm250", reproduce_reference=True
        ),
        fastcache.ToCa(
            fresh_threshold=4, fresh_ratio=0.3, cache_type="similarity", ratio_scheduler="constant"
        ),
        fastcache.ToCa(fresh_threshold=5, fresh_ratio=0.0),
        fastcache.ToCa(fresh_threshold=5, fresh_ratio=0.4, force_fresh="local", reproduce_reference=True),
        fastcache.DuCa(fresh_threshold=3, fresh_ratio=0.3),
        fastcache.DuCa(fresh_threshold=5, fresh_ratio=0.3, cache_type="kv-norm", reproduce_reference=True),
        fastcache.DuCa(fresh_threshold=4, fresh_ratio=0.5, cache_type="random"),
        fastcache.TaylorSeer(interval=3, max_order=2),
        fastcache.TaylorSeer(interval=4, max_order=4),
        fastcache.TaylorSeer(interval=3, max_order=0),
    ],
    ids=str,
)
def test_policies_equal_the_method_written_naively(policy) -> None:
    model, steps = small_dit(), 20
    schedule = policy.schedule(steps, recognise(model).layout())
    with fastcache.accelerate(model, policy, steps):
        found = run(model, steps)
    assert_close(found, run_naively(model, schedule), 1e-4)


@pytest.mark.parametrize("announced", [False, True])
def test_the_modulation_table_changes_nothing(announced: bool) -> None:
    model, policy = small_dit(), fastcache.ToCa(fresh_threshold=3, fresh_ratio=0.3)
    schedule = policy.schedule(STEPS, recognise(model).layout())
    with fastcache.accelerate(model, policy, STEPS) as session:
        if announced:
            session.begin(
                timesteps=torch.stack([inputs(step)[1][0] for step in range(STEPS)]),
                conditions={"y": inputs(0)[2]},
            )
        found = run(model)
    assert_close(found, run_naively(model, schedule), 2e-5)


def test_a_history_takes_its_oldest_buffer_again() -> None:
    model, policy = small_dit(), fastcache.TaylorSeer(interval=3, max_order=2)
    with fastcache.accelerate(model, policy, 20) as session:
        run(model, 20)
    assert session.summary().bytes_held == 6 * 3 * 4 * 16 * 32 * 4


@pytest.mark.parametrize(
    "policy",
    [fastcache.TaylorSeer(interval=3, max_order=2), fastcache.ToCa(3, 0.3), fastcache.FORA(3)],
    ids=lambda policy: type(policy).__name__,
)
def test_features_stored_in_half_precision_take_half_the_memory(backend, policy) -> None:
    model = small_dit()
    with fastcache.accelerate(model, policy, 20, feature_dtype=torch.float32) as wide:
        expected = run(model, 20)
    with fastcache.accelerate(model, policy, 20, feature_dtype=torch.bfloat16) as narrow:
        found = run(model, 20)
    assert narrow.summary().bytes_held * 2 == wide.summary().bytes_held
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert 0 < max(errors) < (0.5 if isinstance(policy, fastcache.ToCa) else 0.05), (
        errors
    )  # ToCa: a few tokens are chosen differently
    with pytest.raises(ValueError, match="feature_dtype: expected float32, float16, bfloat16"):
        fastcache.accelerate(model, policy, 20, feature_dtype=torch.int8)


def test_a_skipped_step_runs_no_block_and_gives_the_hidden_state_before_it() -> None:
    model, policy = small_dit(), fastcache.DuCa(fresh_threshold=3, fresh_ratio=0.3)
    hidden, ran = [], []
    model.final_layer.register_forward_pre_hook(lambda module, args: hidden.append(args[0].clone()))
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: ran.append(len(hidden)))
    with fastcache.accelerate(model, policy, 12) as session:
        run(model, 12)
    skipped = [k for k, step in enumerate(session.schedule.steps) if step.skip]
    assert skipped
    for k in skipped:
        assert torch.equal(hidden[k], hidden[k - 1]) and k not in ran


def test_a_step_that_skips_but_computes_stores_what_it_computed() -> None:
    model = small_dit()
    layout = recognise(model).layout()
    aside = StepPlan(
        layout, tuple(COMPUTE if branch.block == 0 else REUSE for branch in layout.branches), skip=True
    )
    schedule = Schedule(layout, (full_step(layout), aside, uniform_step(layout, REUSE)))
    with fastcache.accelerate(model, schedule):
        found = run(model, 3)
    assert_close(found, run_naively(model, schedule))


def test_full_and_partial_blocks_meet_in_one_step() -> None:
    model = small_dit()
    layout = recognise(model).layout()
    partial = tuple(REUSE if branch.name == "attn" else refresh(4) for branch in layout.branches)
    flip = StepPlan(layout, (COMPUTE, COMPUTE, *partial[2:]))
    other = StepPlan(layout, (*partial[:2], COMPUTE, COMPUTE, *partial[4:]))
    schedule = Schedule(
        layout,
        (
            full_step(layout),
            StepPlan(layout, partial),
            flip,
            StepPlan(layout, partial),
            other,
            StepPlan(layout, partial),
        ),
        selection=Selection("attention", 0.2),
    )
    with fastcache.accelerate(model, schedule):
        found = run(model, 6)
    assert_close(found, run_naively(model, schedule), 2e-5)


def test_forecasts_are_one_launch_of_the_whole_trunk() -> None:
    model = small_dit()
    counts = {}
    for policy in (fastcache.FORA(interval=4), fastcache.TaylorSeer(interval=4, max_order=3)):
        with fastcache.accelerate(model, policy, 20, count_ops=True) as session:
            session.begin(
                timesteps=torch.stack([inputs(step)[1][0] for step in range(20)]),
                conditions={"y": inputs(0)[2]},
            )
            run(model, 20)
        counts[type(policy).__name__] = session.summary().steps
    assert counts["TaylorSeer"]["forecast"].ops == counts["FORA"]["reuse"].ops


def test_a_batch_that_changes_is_computed_in_full_and_never_broadcast() -> None:
    model, schedule = small_dit(), partial_schedule(small_dit(), "attention")
    with fastcache.accelerate(model, schedule) as session, torch.no_grad():
        for step in range(STEPS):
            batch = 4 if step != 2 else 2
            assert model(*inputs(step, batch)).shape[0] == batch
    assert session.summary().recomputed == 2  # the other batch, and the first one after it


def test_the_halves_of_guidance_in_two_calls_choose_their_own_tokens() -> None:
    model, schedule = small_dit(), partial_schedule(small_dit(), "attention")
    expected = run_naively(model, schedule, batch=2)
    with fastcache.accelerate(model, schedule, calls_per_step=2), torch.no_grad():
        found = []
        for step in range(STEPS):
            x, t, y = inputs(step, 2)
            found.append(model(x, t, y))
            model(x.flip(0) * 2, t, y)
    assert_close(found, expected, 2e-5)


def test_random_scores_leave_the_samplers_numbers_alone_and_are_the_same_every_time() -> None:
    model, schedule = small_dit(), partial_schedule(small_dit(), "random")
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        with fastcache.accelerate(model, schedule, record_tokens=True) as session:
            run(model)
        assert torch.equal(before, torch.random.get_rng_state())
        runs.append(session.tokens)
    for step, choices in runs[0].items():
        for branch, chosen in choices.items():
            assert torch.equal(chosen, runs[1][step][branch])
            assert not torch.equal(chosen[:2], chosen[2:])  # four pictures, and no guidance


def test_the_session_tells_which_tokens_were_refreshed() -> None:
    model, schedule = small_dit(), partial_schedule(small_dit(), "attention")
    with fastcache.accelerate(model, schedule, record_tokens=True) as session:
        run(model)
    assert set(session.tokens) == set(range(STEPS))
    assert session.tokens[0] == {} and set(session.tokens[1]) == {1, 5}
    assert (session.tokens[1][1].sum(1) == 5).all() and (session.tokens[1][5].sum(1) == 7).all()


class OwnSoftmax(nn.Module):
    """An attention that multiplies its own softmax, as older hosts do."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = original.qkv, original.proj, original.num_heads

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


def test_the_summary_counts_a_partial_step_that_recomputes_tokens() -> None:
    model = small_dit()
    layout = recognise(model).layout()
    nothing, some = (
        StepPlan(
            layout, tuple(REUSE if branch.name == "attn" else refresh(tokens) for branch in layout.branches)
        )
        for tokens in (0, 5)
    )
    counts = []
    for steps in ((nothing,), (some,), (nothing, some)):
        with fastcache.accelerate(
            model,
            Schedule(layout, (full_step(layout), *steps), selection=Selection("random")),
            count_ops=True,
        ) as session:
            run(model, 1 + len(steps))
        counts.append(session.summary().steps["partial"].ops)
    assert counts[0] < counts[2] <= counts[1]  # the first step of all also copies the gate weights together


def test_an_attention_without_a_fused_kernel_is_read_at_its_projection() -> None:
    model, schedule = small_dit(), partial_schedule(small_dit(), "attention")
    expected = run_naively(model, schedule)
    for block in model.blocks:
        block.attn = OwnSoftmax(block.attn)
    with fastcache.accelerate(model, schedule):
        found = run(model)
    assert_close(found, expected, 2e-5)
    assert not any(block.attn.qkv._forward_hooks for block in model.blocks)


def test_an_attention_that_cannot_be_read_is_an_error_that_names_it() -> None:
    model = small_dit()
    for block in model.blocks:
        block.attn = nn.Sequential(nn.Linear(32, 32))
    schedule = partial_schedule(model, "attention")
    with (
        pytest.raises(fastcache.HostError, match=r"blocks\.0\.attn: no queries and keys"),
        fastcache.accelerate(model, schedule),
    ):
        run(model)
    with fastcache.accelerate(model, partial_schedule(model, "norm")):
        run(model)


def test_a_bonus_needs_a_square_grid() -> None:
    model = DiT(
        input_size=6, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=CLASSES
    ).eval()
    schedule = partial_schedule(model, "straight")
    with (
        pytest.raises(
            fastcache.ScheduleError,
            match="cell: the spatial bonus needs a square token grid whose side 2 divides, got 9",
        ),
        fastcache.accelerate(model, schedule),
        torch.no_grad(),
    ):
        for step in range(STEPS):
            model(*inputs(step, size=6))


def test_regional_compile_of_refreshes_needs_one_graph_more_and_no_recompiles() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_dit()
    layout = recognise(model).layout()
    partial = [
        StepPlan(
            layout,
            tuple(
                REUSE if branch.name == "attn" else refresh(k + branch.block) for branch in layout.branches
            ),
        )
        for k in (1, 0, 6, 3)
    ]
    schedule = Schedule(layout, (full_step(layout), *partial) * 2, selection=Selection("random"))
    expected = run_naively(model, schedule)
    with fastcache.accelerate(model, schedule, compile=True):
        found = run(model, 10)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 2, dict(counters["stats"])
    assert not counters["graph_break"] and not counters["recompiles"], dict(counters)
    assert_close(found, expected, 2e-5)


# -- budgets -------------------------------------------------------------------------------------------

DEPTH = 28


def deep_dit() -> DiT:
    torch.manual_seed(0)
    model = (
        DiT(
            input_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            depth=DEPTH,
            num_heads=2,
            num_classes=CLASSES,
        )
        .eval()
        .requires_grad_(False)
    )
    return model


@torch.no_grad()
def operators_by_step(policy, steps: int = 50) -> tuple[Schedule, list[int]]:
    """Operators that every forward with guidance dispatches, views excluded."""
    model, counts = deep_dit(), []
    with fastcache.accelerate(model, policy, steps, count_ops=False) as session:
        schedule = session.schedule
        for step in range(steps):
            x, t, y = inputs(step % STEPS, size=16)
            with OperatorCount() as counter:
                model.forward_with_cfg(x, torch.full_like(t, 990.0 - step), y, 1.5)
            counts.append(counter.count)
    return schedule, counts


@pytest.mark.parametrize(
    ("policy", "per_block"),
    [
        (fastcache.ToCa(3, 0.07), 8),
        (fastcache.ToCa(3, 0.07, "similarity"), 10),
        (fastcache.ToCa(3, 0.07, "norm"), 10),
        (fastcache.DuCa(3, 0.05, "kv-norm"), 8),
    ],
    ids=str,
)
def test_a_partial_step_stays_within_its_budget(policy, per_block: int) -> None:
    schedule, counts = operators_by_step(policy)
    partial = [count for step, count in zip(schedule.steps, counts, strict=True) if step.kind == "partial"]
    assert max(partial) <= DEPTH * per_block + 60, max(partial)
    assert policy.cache_type not in ("attention", "kv-norm") or max(partial) <= 180, max(partial)
    assert min(partial) <= 60  # a step whose shares come to no token recomputes nothing


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize(
    "policy", [fastcache.FORA(3), fastcache.DuCa(3, 0.05), fastcache.TaylorSeer(4, 4)], ids=str
)
def test_a_cached_step_without_fresh_tokens_stays_within_its_budget(policy, announced: bool) -> None:
    model, steps = deep_dit(), 20
    with fastcache.accelerate(model, policy, steps, count_ops=False) as session, torch.no_grad():
        if announced:
            session.begin(timesteps=torch.arange(steps, 0, -1).float(), conditions={"y": inputs(0)[2]})
        for step, plan in enumerate(session.schedule.steps):
            x, _, y = inputs(step % STEPS, size=16)
            with OperatorCount() as counter:
                model.forward_with_cfg(x, torch.full((4,), float(steps - step)), y, 1.5)
            if plan.kind in ("reuse", "skip", "forecast"):
                assert counter.count <= 40, (step, plan.kind, counter.count)


def test_a_full_step_that_scores_attention_costs_little_more_than_the_host() -> None:
    model = deep_dit()
    x, t, y = inputs(0, size=16)
    with OperatorCount() as counter, torch.no_grad():
        model.forward_with_cfg(x, t, y, 1.5)
    schedule, counts = operators_by_step(fastcache.ToCa(3, 0.07), 8)
    assert (
        max(count for step, count in zip(schedule.steps, counts, strict=False) if step.kind == "full")
        <= counter.count + DEPTH
    )


class Watch(TorchDispatchMode):
    """The largest tensor that appears, and every operator that reads a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.reads = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::is_nonzero",
        ):
            self.reads.append(func._schema.name)
        self.largest = max(
            [
                self.largest,
                *(
                    tensor.numel()
                    for tensor in torch.utils._pytree.tree_leaves(out)
                    if isinstance(tensor, torch.Tensor)
                ),
            ]
        )
        return out


@pytest.mark.parametrize(
    "policy",
    [
        fastcache.ToCa(3, 0.3),
        fastcache.ToCa(3, 0.3, "similarity"),
        fastcache.DuCa(3, 0.3, "kv-norm"),
        fastcache.ToCa(3, 0.3, "random"),
        fastcache.TaylorSeer(3, 2),
    ],
    ids=str,
)
def test_no_step_reads_a_value_back(policy) -> None:
    if not fastcache.backends_status()["cpp"].available:
        pytest.skip("the eager definition checks values of CPU index tensors")
    model = small_dit()
    with fastcache.accelerate(model, policy, STEPS, calls_per_step=1, count_ops=False), Watch() as watch:
        run(model)
    assert not watch.reads


def test_scoring_attention_never_makes_a_map(monkeypatch) -> None:
    tokens = 32 * 32
    monkeypatch.setattr(fastcache.backends.eager_tokens, "CHUNK_LOGITS", 2 * 1 * tokens * 16)
    model = (
        DiT(
            input_size=64,
            patch_size=2,
            in_channels=4,
            hidden_size=8,
            depth=1,
            num_heads=1,
            num_classes=CLASSES,
            mlp_ratio=1,
        )
        .eval()
        .requires_grad_(False)
    )
    with (
        fastcache.accelerate(model, fastcache.ToCa(2, 0.1, ratio_scheduler="constant"), 2, count_ops=False),
        Watch() as watch,
        torch.no_grad(),
    ):
        for step in range(2):
            model(*inputs(step, 2, 64))
    assert watch.largest < tokens * tokens
