"""Nothing grows with the number of generations, and a closed session holds nothing of the model's size."""

import gc
import inspect
import types
from collections.abc import Callable

import pytest
import torch
from equal_or_loud import POLICY
from hosts import STEPS, inputs, run, small_dit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache

POLICIES = {
    "FORA": fastcache.FORA(interval=3),
    "ToCa": fastcache.ToCa(fresh_threshold=3, fresh_ratio=0.3, cache_type="random"),
    "TaylorSeer": fastcache.TaylorSeer(interval=3, max_order=2),
    "all in full": fastcache.FORA(interval=1),
}
OUTSIDE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
)


SHORT = 5  # steps of a generation where there are many


def reachable(session: fastcache.Session) -> dict[int, object]:
    """Everything that a session keeps alive, by id, the model and what belongs to Python itself left out."""
    model = session.host.model
    skipped = {id(each) for each in (*model.modules(), *model.parameters(), *model.buffers())}
    found: dict[int, object] = {}
    waiting: list[object] = [session]
    while waiting:
        each = waiting.pop()
        if id(each) in found or id(each) in skipped or isinstance(each, OUTSIDE):
            continue
        found[id(each)] = each
        waiting.extend(gc.get_referents(each))
    return found


def kept_bytes(session: fastcache.Session) -> int:
    """Bytes of the tensors that a session keeps alive, storages counted once, the model's own left out."""
    own = {each.untyped_storage().data_ptr() for each in session.host.model.state_dict().values()}
    tensors = [each for each in reachable(session).values() if isinstance(each, Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


def sizes(session: fastcache.Session) -> tuple[int, int]:
    """(number of objects but whole numbers and names, bytes of tensors) that a session keeps alive."""
    gc.collect()
    return sum(not isinstance(each, (int, str)) for each in reachable(session).values()), kept_bytes(session)


def live_tensors() -> int:
    """Tensors of this process that Python knows."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def announce(session: fastcache.Session) -> None:
    timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
    session.begin(timesteps=timesteps, conditions={"y": inputs(0)[2]})


def test_what_is_counted_contains_features_and_grows_with_them() -> None:
    model = small_dit(depth=2)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        before = sizes(session)
        run(model, 2)
        after = sizes(session)
        session.reset()
    assert (
        after[0] > before[0] and after[1] >= before[1] + 4 * 4 * 16 * 32 * 4
    )  # 4 features of 4 x 16 x 32 float32


LIVES = {  # policy, calls a step, begun
    **{name: (policy, 1, False) for name, policy in POLICIES.items()},
    "FORA, two calls": (POLICIES["FORA"], 2, False),
    "FORA, begun": (POLICIES["FORA"], 1, True),
    "ToCa, begun": (POLICIES["ToCa"], 1, True),
}


@pytest.mark.parametrize(("policy", "calls", "begun"), LIVES.values(), ids=LIVES)
def test_a_session_does_not_grow_after_its_second_generation(
    policy: fastcache.Policy, calls: int, begun: bool
) -> None:
    model = small_dit(depth=1)
    timesteps = torch.stack([inputs(step)[1][0] for step in range(SHORT)])

    def generations(number: int) -> None:
        for _ in range(number):
            if begun:
                session.begin(timesteps=timesteps, conditions={"y": inputs(0, 1)[2]})
            for step in range(SHORT):
                for _ in range(calls):
                    model(*inputs(step, 1))

    with fastcache.accelerate(model, policy, SHORT, calls_per_step=calls) as session, torch.no_grad():
        generations(2)
        before = sizes(session)
        generations(20)
        after = sizes(session)
    assert after == before, f"(objects, bytes) {before} after 2 generations, {after} after 22"


def test_a_generation_without_end_does_not_grow() -> None:
    """A sampler that names its steps never ends a generation."""
    model = small_dit(depth=1)
    with fastcache.accelerate(model, POLICY, STEPS, calls_per_step=1) as session, torch.no_grad():

        def steps(number: int) -> None:
            for k in range(number):
                session.step(k % (STEPS - 1))
                model(*inputs(k % (STEPS - 1)))

        steps(20)
        before = sizes(session)
        steps(100)
        after = sizes(session)
        session.reset()
    assert after[0] <= before[0] and after[1] <= before[1], (
        f"(objects, bytes) {before} after 20 steps, {after} after 120"
    )


def other_resolutions() -> None:
    for batch in (1, 2, 5):
        model = small_dit(depth=1)
        with fastcache.accelerate(model, fastcache.ToCa(4, 0.1 + 0.1 * batch, cache_type="random"), STEPS):
            run(model, STEPS, batch)


def other_forecasts() -> None:
    for interval in (5, 7):
        model = small_dit(depth=1)
        with fastcache.accelerate(model, fastcache.TaylorSeer(interval=interval, max_order=3), 19 + interval):
            run(model, 19 + interval)


def other_depths() -> None:
    for depth in (4, 5):
        model = small_dit(depth=depth)
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model)


@pytest.mark.parametrize("use", [other_resolutions, other_forecasts, other_depths])
def test_closed_sessions_leave_no_tensors_in_the_process(use: Callable[[], None]) -> None:
    with fastcache.accelerate(
        small_dit(), POLICIES["ToCa"], STEPS
    ) as session:  # what is made once is made here
        run(session.host.model)
    del session
    before = live_tensors()
    use()
    assert live_tensors() == before


def test_features_are_freed_when_a_generation_ends() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model, STEPS - 1)
        held = kept_bytes(session)
        with torch.no_grad():
            model(*inputs(STEPS - 1))
        left = kept_bytes(session)
    features = 2 * len(model.blocks) * 4 * 16 * 32 * 4
    assert left <= held - features, f"{left} of {held} bytes, {features} of which were features"


LEFT = {  # policy, begun, left by an exception
    **{name: (policy, False, False) for name, policy in POLICIES.items()},
    "FORA, by an exception": (POLICIES["FORA"], False, True),
    "FORA, begun": (POLICIES["FORA"], True, False),
    "FORA, begun, by an exception": (POLICIES["FORA"], True, True),
}


@pytest.mark.parametrize(("policy", "begun", "failing"), LEFT.values(), ids=LEFT)
def test_a_session_that_was_left_holds_no_features_gates_or_tables(
    policy: fastcache.Policy, begun: bool, failing: bool
) -> None:
    model = small_dit()
    try:
        with fastcache.accelerate(model, policy, STEPS, keep=True) as session:
            if begun:
                announce(session)
            run(model)
            held = kept_bytes(session)
            if failing:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    gc.collect()
    assert session.summary().generations == 1  # what it measured is still there
    left = kept_bytes(session)
    assert left < 4096, f"{left} of {held} bytes"


def test_a_session_that_was_left_does_not_keep_the_samplers_tensors() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
        mine = [inputs(step) for step in range(STEPS)]
        outputs = [model(*each) for each in mine]
    known = {id(each) for tensors in mine for each in tensors} | {id(each) for each in outputs}
    assert not known & set(reachable(session))


# -- operators are counted on request ------------------------------------------------------------------


def modes_of(model: nn.Module, **options) -> list[int]:
    """How many dispatch modes were active when each body of a generation ran."""
    depth: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda *_: depth.append(torch._C._len_torch_dispatch_stack()))
    model.final_layer.register_forward_hook(lambda *_: depth.append(torch._C._len_torch_dispatch_stack()))
    with fastcache.accelerate(model, POLICY, STEPS, **options):
        run(model)
    return depth


def test_no_dispatch_mode_is_active_around_production_calls() -> None:
    depth = modes_of(small_dit())
    assert len(depth) > STEPS and set(depth) == {0}


def test_no_dispatch_mode_is_entered_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    enter = TorchDispatchMode.__enter__
    monkeypatch.setattr(
        TorchDispatchMode, "__enter__", lambda mode: entered.append(type(mode)) or enter(mode)
    )
    for policy in POLICIES.values():
        model = small_dit(depth=1)
        with fastcache.accelerate(model, policy, STEPS):
            run(model)
    assert not entered


def test_operators_are_counted_on_request() -> None:
    assert 1 in modes_of(small_dit(), count_ops=True)
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS, count_ops=True) as session:
        run(model)
    steps = session.summary().steps
    assert 0 < steps["reuse"].ops < steps["full"].ops


def test_a_summary_without_counting_says_that_nothing_was_counted() -> None:
    model = small_dit()
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
    summary = session.summary()
    assert {kind.ops for kind in summary.steps.values()} == {None} and " - ops" in str(summary)


def test_counting_is_off_by_default() -> None:
    for function in (fastcache.accelerate, fastcache.Session):
        assert inspect.signature(function).parameters["count_ops"].default is False
