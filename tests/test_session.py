"""Generations: steps, resets, calls per step, shapes, devices of knowledge."""

import copy
import threading

import pytest
import torch
from hosts import CLASSES, STEPS, assert_close, foreign_dit, inputs, reference, run, small_dit
from support import available_backends

import fastcache
from fastcache.hosts import recognise
from fastcache.schedule import COMPUTE, REUSE, Schedule, StepPlan, full_step, skip_step, uniform_step

POLICY = fastcache.FORA(interval=3)
FULL = POLICY.full_steps(STEPS)


@pytest.fixture(params=available_backends("cpu"))
def backend(request):
    with fastcache.use_backend(request.param):
        yield request.param


def test_cached_steps_equal_the_definition(backend) -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model)
    assert_close(found, reference(model, FULL))


def test_a_foreign_class_is_recognised_by_its_structure(backend) -> None:
    model = foreign_dit()
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model)
    assert_close(found, reference(model, FULL))


def test_interval_one_is_bit_identical_to_the_host() -> None:
    model = small_dit()
    expected = run(model)
    with fastcache.accelerate(model, fastcache.FORA(interval=1), STEPS):
        found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_reuse_step_runs_no_branch_body_and_one_stream_launch() -> None:
    model = small_dit()
    ran = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *_: ran.append("attn"))
        block.mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    launches = []
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        for step in range(STEPS):
            with Launches() as counter:
                model(*inputs(step))
            launches.append(counter.count)
    assert len(ran) == 2 * len(model.blocks) * len(FULL)
    if fastcache.backends_status()["cpp"].available:
        assert [launches[k] for k in range(STEPS) if k not in FULL] == [1] * (STEPS - len(FULL))
        assert [launches[k] for k in FULL] == [2 * len(model.blocks) + 1] * len(FULL)
    assert session.summary().steps["reuse"].count == STEPS - len(FULL)


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts launches of the residual stream, with and without a slot that is stored in them."""

    OPERATORS = (
        torch.ops.fastcache.residual_update.default,
        torch.ops.fastcache.residual_update_scatter_.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.OPERATORS
        return func(*args, **(kwargs or {}))


def test_gates_follow_the_current_step_and_features_do_not(backend) -> None:
    model = small_dit()
    layout = recognise(model).layout()
    schedule = Schedule(layout, (full_step(layout), uniform_step(layout, REUSE)))
    x, t, y = inputs(0)
    outputs = []
    for later in (t, t - 500):
        with fastcache.accelerate(model, schedule, calls_per_step=1), torch.no_grad():
            model(x, t, y)
            outputs.append(model(x, later, y))
    with torch.no_grad():
        assert_close([outputs[0]], [model(x, t, y)])
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)


def test_a_second_generation_starts_over_by_itself(backend) -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        first, second = run(model), run(model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert session.summary().generations == 2


def test_features_are_freed_when_a_generation_ends_unless_kept() -> None:
    model = small_dit()
    for keep in (False, True):
        with fastcache.accelerate(model, POLICY, STEPS, keep=keep) as session:
            run(model)
            assert (session._trunk.nbytes > 0) == keep
        assert session._trunk.nbytes == 0
        assert session.summary().bytes_held == 2 * len(model.blocks) * 4 * 16 * 32 * 4


def test_announced_timesteps_give_the_same_outputs_without_modulation_calls(backend) -> None:
    model = small_dit()
    calls = []
    for block in model.blocks:
        block.adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))
    y = inputs(0)[2]
    timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        session.begin(timesteps=timesteps, conditions={"y": y})
        announced = len(calls)
        found = run(model)
    assert announced == len(calls) == len(model.blocks)
    assert_close(found, reference(model, FULL))
    assert session.summary().table_bytes == STEPS * len(model.blocks) * 6 * 4 * 32 * 4


def test_wrongly_announced_timesteps_are_an_error() -> None:
    model = small_dit()
    with pytest.raises(fastcache.SessionError, match="timesteps or conditions"):
        with fastcache.accelerate(model, POLICY, STEPS) as session:
            session.begin(timesteps=torch.linspace(0, 900, STEPS), conditions={"y": inputs(0)[2]})
            run(model)


def test_begin_checks_its_arguments() -> None:
    model = small_dit()
    y = inputs(0)[2]
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        with pytest.raises(fastcache.SessionError, match=r"timesteps: expected \[8\]"):
            session.begin(timesteps=torch.zeros(3), conditions={"y": y})
        with pytest.raises(fastcache.SessionError, match="belong together"):
            session.begin(timesteps=torch.zeros(STEPS))
        with pytest.raises(fastcache.SessionError, match="conditions: a DiT is conditioned on y"):
            session.begin(timesteps=torch.zeros(STEPS), conditions={"labels": y})


def test_begin_can_change_the_number_of_steps(backend) -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
        session.begin(num_steps=5)
        found = run(model, 5)
    assert_close(found, reference(model, POLICY.full_steps(5), 5))


@pytest.mark.parametrize("declared", [2, None], ids=["declared", "found"])
def test_two_calls_a_step_keep_two_sets_of_features(backend, declared) -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=declared) as session, torch.no_grad():
        for _ in range(2):
            found = [
                (model(x, t, y), model(x, t, torch.full_like(y, CLASSES)))
                for x, t, y in (inputs(step) for step in range(STEPS))
            ]
    assert_close([cond for cond, _ in found], reference(model, FULL))
    assert session.summary().generations == 2
    with torch.no_grad():
        assert torch.allclose(found[0][1], model(*inputs(0)[:2], torch.full((4,), CLASSES)), atol=1e-4)


def test_batch_change_midway_recomputes(backend) -> None:
    model = small_dit()
    uncached = copy.deepcopy(model)
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        for step in range(STEPS):
            batch = 4 if step < 2 else 1  # step 2 is planned as reuse
            found = model(*inputs(step, batch))
            if step == 2:
                assert_close([found], [uncached(*inputs(step, batch))])
    assert session.summary().recomputed == 1


def test_resolution_change_midway_recomputes(backend) -> None:
    model = foreign_dit()
    uncached = copy.deepcopy(model)
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        for step in range(STEPS):
            size = 8 if step < 2 else 4
            found = model(*inputs(step, 4, size))
            if step == 2:
                assert_close([found], [uncached(*inputs(step, 4, size))])
    assert session.summary().recomputed == 1


def test_a_skipped_step_hands_back_the_last_trunk_output(backend) -> None:
    model = small_dit()
    layout = recognise(model).layout()
    seen = []
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with (
        fastcache.accelerate(
            model, Schedule(layout, (full_step(layout), skip_step(layout), uniform_step(layout, REUSE)))
        ) as session,
        torch.no_grad(),
    ):
        for step in range(3):
            model(*inputs(step))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert session.summary().steps["skip"].count == 1


def test_a_plan_may_mix_actions_within_a_step(backend) -> None:
    model = small_dit()
    layout = recognise(model).layout()
    mixed = StepPlan(layout, tuple(COMPUTE if index % 3 else REUSE for index in range(len(layout.branches))))
    with (
        fastcache.accelerate(
            model, Schedule(layout, (full_step(layout), mixed)), calls_per_step=1
        ) as session,
        torch.no_grad(),
    ):
        first, second = model(*inputs(0)), model(*inputs(0))
    assert_close([second], [first])  # the same input: what is recomputed equals what is stored
    assert session.summary().steps["mixed"].count == 1


def test_equal_first_timesteps_that_are_not_cfg_can_be_declared() -> None:
    model = small_dit()
    with pytest.raises(fastcache.SessionError, match="calls_per_step=1"):
        with fastcache.accelerate(model, POLICY, 3), torch.no_grad():
            for _ in range(3):
                model(*inputs(0))
    with fastcache.accelerate(model, POLICY, 3, calls_per_step=1), torch.no_grad():
        for _ in range(3):
            model(*inputs(0))


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "50"])
def test_a_bad_number_of_steps_is_named(bad) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        fastcache.accelerate(small_dit(), POLICY, bad)


def test_an_incomplete_generation_is_an_error_that_says_the_count() -> None:
    model = small_dit()
    with pytest.raises(fastcache.SessionError, match=r"after 5 of 8 steps.*num_steps=5"):
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model, 5)
    assert "forward" not in model.__dict__


def test_stopping_on_purpose_is_allowed_after_reset() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model, 5)
        session.reset()


def test_an_unknown_model_is_told_what_was_looked_for() -> None:
    with pytest.raises(fastcache.HostError, match="blocks.*adapter"):
        fastcache.accelerate(torch.nn.Linear(2, 2), POLICY, 4)


def test_a_schedule_for_other_branches_is_an_error() -> None:
    model, other = small_dit(), small_dit(depth=5)
    schedule = POLICY.schedule(STEPS, recognise(other).layout())
    with pytest.raises(fastcache.ScheduleError, match="attn, mlp.*5 blocks.*3 blocks"):
        fastcache.accelerate(model, schedule)


def test_a_schedule_of_another_length_is_an_error() -> None:
    model = small_dit()
    schedule = POLICY.schedule(STEPS, recognise(model).layout())
    with pytest.raises(fastcache.ScheduleError, match="8 steps, got 9"):
        fastcache.accelerate(model, schedule, 9)


def test_use_from_another_thread_is_an_error() -> None:
    model, caught = small_dit(), []

    def call() -> None:
        try:
            run(model, 1)
        except fastcache.SessionError as error:
            caught.append(str(error))

    with fastcache.accelerate(model, POLICY, STEPS):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "another thread" in caught[0]


def test_two_models_in_two_threads_are_independent(backend) -> None:
    models, found = [small_dit(0), small_dit(1)], {}

    def call(number: int) -> None:
        with fastcache.accelerate(models[number], POLICY, STEPS):
            found[number] = run(models[number])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, model in enumerate(models):
        assert_close(found[number], reference(model, FULL))


def test_autocast_computes_in_bfloat16_and_stays_close(backend) -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS), torch.autocast("cpu", torch.bfloat16):
        found = run(model)
    assert_close(found, reference(model, FULL), 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_stay_close(backend, dtype) -> None:
    model = small_dit(dtype=dtype)
    with fastcache.accelerate(model, POLICY, STEPS), torch.no_grad():
        found = [model(*inputs(step, dtype=dtype)) for step in range(STEPS)]
    assert_close(found, reference(small_dit(), FULL), 0.2)


def test_grad_mode_with_trainable_parameters_raises_and_restores() -> None:
    model = small_dit().requires_grad_(True)
    with pytest.raises(RuntimeError, match="forward-only"), fastcache.accelerate(model, POLICY, STEPS):
        model(*inputs(0))
    assert "forward" not in model.__dict__


def test_the_summary_names_kinds_times_ops_and_speedups() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS, count_ops=True) as session:
        run(model)
    summary = session.summary()
    assert summary.steps["full"].count == len(FULL) and summary.steps["reuse"].ops < summary.steps["full"].ops
    assert summary.quotient == pytest.approx(summary.measured_speedup / summary.ideal_speedup)
    assert "reuse" in str(summary) and "ideal" in str(summary)
