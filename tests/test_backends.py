"""Which backend runs, how one is forced, and what happens where it cannot run."""

import asyncio
import contextvars
import os
import threading
import types
from collections.abc import Callable

import pytest
import torch
from cases import BACKENDS, FORMS, Form, assert_same_bits, build, each_backend, each_form
from processes import fails, succeeds
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache import BackendError, backends, use_backend
from fastcache.backends import eager
from fastcache.ops import residual_update

CPU = torch.device("cpu")
STATUS = fastcache.backends_status()
ABSENT = [name for name, status in STATUS.items() if not status.available]
FIRST = next(name for name in backends.ORDER["cpu"] if STATUS[name].available)
BUILT = pytest.mark.skipif(not STATUS["cpp"].available, reason=f"cpp: {STATUS['cpp'].reason}")
MODULES = {
    "eager": "fastcache.backends.eager",
    "cpp": "fastcache.backends.native",
    "cuda": "fastcache.backends.native",
    "triton": "fastcache.backends.triton",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class OperatorsSeen(TorchDispatchMode):
    """Names of the fastcache operators that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcache":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def operators_seen(call: Callable[[], object]) -> list[str]:
    with OperatorsSeen() as seen:
        call()
    return seen.names


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps"])
def test_the_chooser_takes_the_first_available_backend_of_the_device(device: str, dtype: torch.dtype) -> None:
    expected = next(name for name in backends.ORDER.get(device, ("eager",)) if STATUS[name].available)
    expected = "eager" if dtype is torch.float64 else expected
    assert backends.chosen_name(torch.device(device), dtype) == expected
    assert backends.choose(torch.device(device), dtype).__name__ == MODULES[expected]


def test_every_backend_has_a_status_with_a_reason() -> None:
    assert tuple(STATUS) == backends.NAMES
    assert all(status.reason and status.name == name for name, status in STATUS.items())
    assert STATUS["eager"].available


def test_the_status_cannot_be_changed_from_outside() -> None:
    fastcache.backends_status().clear()
    assert fastcache.backends_status() == STATUS


@pytest.mark.parametrize("name", [name for names in backends.ORDER.values() for name in names])
def test_every_backend_in_the_order_has_a_name(name: str) -> None:
    assert name in backends.NAMES


@each_backend
@each_form
def test_a_forced_backend_is_the_one_that_runs(form: Form, backend: str) -> None:
    call = build(form)
    expected = [] if backend == "eager" else [call.operator._opname]
    assert operators_seen(lambda: call.run(backend)) == expected


def test_the_backend_that_is_named_is_the_one_that_runs_unforced() -> None:
    call = build(FORMS["all"])
    assert bool(operators_seen(call.call_public)) == (backends.chosen_name(CPU) != "eager")


@pytest.fixture
def device_that_checks(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose first backend checks itself before its first use."""
    monkeypatch.setitem(backends.ORDER, "xpu", (FIRST, "eager"))
    monkeypatch.setattr(backends, "_AGREED", {})
    return torch.device("xpu")


@BUILT
def test_a_backend_that_disagrees_with_eager_is_not_used_and_a_warning_says_so(
    device_that_checks: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends.selfcheck, "disagreement", lambda module, device, operator: "x differs by 3")
    assert backends.choose(device_that_checks, torch.float32).__name__ == MODULES["eager"]
    assert backends.chosen_name(device_that_checks) == "eager"
    assert caplog.messages == [
        "backend cpp disagrees with eager on xpu and will not run residual_update: x differs by 3"
    ]


@BUILT
def test_a_backend_that_agrees_is_checked_once_and_used(
    device_that_checks: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[torch.device] = []
    monkeypatch.setattr(
        backends.selfcheck,
        "disagreement",
        lambda module, device, operator: checked.append((device, operator)),
    )
    for _ in range(3):
        assert backends.choose(device_that_checks, torch.float32).__name__ == MODULES["cpp"]
    assert checked == [(device_that_checks, "residual_update")]


# --- float64 ----------------------------------------------------------------------------------


def test_float64_runs_in_eager_and_in_float64() -> None:
    x = torch.full((1, 2, 4), 1.0, dtype=torch.float64)
    feature = torch.full_like(x, 2.0**-40)  # lost in float32
    assert operators_seen(lambda: residual_update(x, [feature])) == []
    assert residual_update(x, [feature]).x[0, 0, 0].item() == 1.0 + 2.0**-40


def test_float64_runs_in_eager_in_a_compiled_function_too() -> None:
    torch._dynamo.reset()
    x = torch.full((1, 2, 4), 1.0, dtype=torch.float64)
    function = torch.compile(
        lambda x, feature: residual_update(x, [feature]).x, fullgraph=True, backend="aot_eager"
    )
    assert function(x, torch.full_like(x, 2.0**-40))[0, 0, 0].item() == 1.0 + 2.0**-40


@BUILT
def test_a_compiled_backend_refuses_float64_instead_of_rounding_it() -> None:
    x = torch.ones(1, 2, 4, dtype=torch.float64)
    with (
        use_backend("cpp"),
        pytest.raises(BackendError, match="x is float64: only eager computes in float64"),
    ):
        residual_update(x, [x])
    with use_backend("eager"):
        assert residual_update(x, [x]).x.dtype is torch.float64
    with pytest.raises(
        RuntimeError, match=r"features\[0\]: torch.float64 is computed by the eager backend only"
    ):
        torch.ops.fastcache.residual_update(x.float(), [x])


# --- use_backend ------------------------------------------------------------------------------


def test_use_backend_nests_and_restores() -> None:
    with use_backend(FIRST):
        with use_backend("eager"):
            assert backends.chosen_name(CPU) == "eager"
            with use_backend(FIRST):
                assert backends.chosen_name(CPU) == FIRST
            assert backends.chosen_name(CPU) == "eager"
        assert backends.chosen_name(CPU) == FIRST


def test_use_backend_restores_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("eager"):
        raise ZeroDivisionError
    assert backends.chosen_name(CPU) == FIRST


@pytest.mark.parametrize("name", ["gpu", "", "Eager", "cpu", "naive"])
def test_an_unknown_backend_is_refused_with_the_names_that_exist(name: str) -> None:
    with (
        pytest.raises(BackendError, match="use_backend: expected one of cpp, cuda, triton, eager, got"),
        use_backend(name),
    ):
        pass
    assert backends.chosen_name(CPU) == FIRST


@pytest.mark.parametrize("name", ABSENT)
def test_an_unavailable_backend_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(BackendError) as caught, use_backend(name):
        pass
    assert str(caught.value) == f"use_backend: backend {name!r} cannot run here: {STATUS[name].reason}"


@BUILT
def test_a_backend_of_another_device_is_refused_by_name() -> None:
    with (
        use_backend("cpp"),
        pytest.raises(
            BackendError, match="backend 'cpp' was forced, but x is on cuda:0: it runs cuda, triton, eager"
        ),
    ):
        backends.choose(torch.device("cuda:0"), torch.float32)


def test_use_backend_does_not_reach_into_other_threads() -> None:
    seen: list[str] = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.chosen_name(CPU)))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: seen.append(context.run(backends.chosen_name, CPU)))
        thread.start()
        thread.join()
    assert seen == [FIRST, "eager"]


def test_use_backend_does_not_leak_between_tasks() -> None:
    async def forced(name: str, seen: list[str]) -> None:
        with use_backend(name):
            await asyncio.sleep(0.01)
            seen.append(backends.chosen_name(CPU))

    async def both() -> list[str]:
        seen: list[str] = []
        await asyncio.gather(forced("eager", seen), forced(FIRST, seen))
        return [*seen, backends.chosen_name(CPU)]

    assert asyncio.run(both()) == ["eager", FIRST, FIRST]


def test_backends_agree_on_what_they_return() -> None:
    for form in FORMS.values():
        results = [build(form).run(backend) for backend in BACKENDS]
        for other in results[1:]:
            assert [None if output is None else (output.shape, output.dtype) for output in other] == [
                None if output is None else (output.shape, output.dtype) for output in results[0]
            ]


# --- the environment --------------------------------------------------------------------------

NAME = "import torch, fastcache; print(fastcache.backends.chosen_name(torch.device('cpu')))"


@pytest.mark.parametrize(("value", "expected"), [("eager", "eager"), (FIRST, FIRST), ("", FIRST)])
@pytest.mark.slow
def test_the_environment_forces_a_backend(value: str, expected: str) -> None:
    assert succeeds(
        NAME, FASTCACHE_BACKEND=value, FASTCACHE_NO_COMPILED=os.environ.get("FASTCACHE_NO_COMPILED", "")
    ).split() == [expected]


@pytest.mark.slow
def test_a_block_overrides_the_environment_and_threads_inherit_it() -> None:
    succeeds(
        f"""
import threading, torch, fastcache
name = lambda: fastcache.backends.chosen_name(torch.device("cpu"))
with fastcache.use_backend({FIRST!r}):
    assert name() == {FIRST!r}
assert name() == "eager"
seen = []
thread = threading.Thread(target=lambda: seen.append(name()))
thread.start(); thread.join()
assert seen == ["eager"], seen
""",
        FASTCACHE_BACKEND="eager",
    )


@pytest.mark.slow
def test_an_unknown_name_in_the_environment_is_an_error_at_import() -> None:
    assert "BackendError: FASTCACHE_BACKEND: expected one of cpp, cuda, triton, eager, got 'fast'" in fails(
        NAME, FASTCACHE_BACKEND="fast"
    )


@pytest.mark.slow
def test_an_unavailable_name_in_the_environment_is_an_error_with_its_reason() -> None:
    error = fails(NAME, FASTCACHE_BACKEND="cpp", FASTCACHE_NO_COMPILED="1")
    assert (
        "BackendError: FASTCACHE_BACKEND: backend 'cpp' cannot run here: switched off by"
        " FASTCACHE_NO_COMPILED=1" in error
    )


@BUILT
def test_a_forced_backend_gives_the_same_bits_as_the_same_backend_unforced() -> None:
    call, other = build(FORMS["refresh-all"]), build(FORMS["refresh-all"])
    assert_same_bits(call.run("cpp"), other.call_public())


# --- the check that a GPU backend makes of itself ----------------------------------------------------


@pytest.mark.parametrize("operator", backends.library.OPERATORS)
def test_a_self_check_finds_an_operator_that_is_slightly_wrong(operator: str) -> None:
    wrong = types.SimpleNamespace(**{name: getattr(eager, name) for name in backends.library.OPERATORS})
    assert backends.selfcheck.disagreement(wrong, torch.device("cpu"), operator) == ""

    def shifted(*args: object, **kwargs: object) -> object:
        outputs = getattr(eager, operator)(*args, **kwargs)
        first, *rest = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        first.view(-1)[-1] += 1
        return first if isinstance(outputs, torch.Tensor) else (first, *rest)

    setattr(wrong, operator, shifted)
    assert backends.selfcheck.disagreement(wrong, torch.device("cpu"), operator)
