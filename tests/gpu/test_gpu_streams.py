"""Streams, the caching allocator, other devices, and no waiting."""

import pytest
import torch
from cases import PRECISIONS, SCATTERS, UPDATES, Form, assert_same_bits
from on_device import available, build, each_kernel_backend
from torch import Tensor

from fastcache import backends, use_backend
from fastcache.ops import residual_update

CYCLES = 40_000_000  # about 20 ms of a GPU at 2 GHz


@each_kernel_backend
def test_a_kernel_runs_on_the_current_stream(backend: str, device: torch.device) -> None:
    x, feature = torch.zeros(2, 64, 128, device=device), torch.ones(2, 64, 128, device=device)
    with use_backend(available(backend)):
        residual_update(x, feature)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(CYCLES)
            x.fill_(3)  # after the sleep: a kernel on another stream would still see zeros
            found = residual_update(x, feature).x
        side.synchronize()
    assert found.eq(4).all()


@each_kernel_backend
def test_memory_that_is_freed_on_a_side_stream_is_not_used_too_early(
    backend: str, device: torch.device
) -> None:
    side, kept = torch.cuda.Stream(), []
    with use_backend(available(backend)), torch.cuda.stream(side):
        for step in range(50):
            x, feature = (
                torch.full((2, 256, 512), value, device=device, dtype=torch.bfloat16)
                for value in (float(step), 2.0)
            )
            out = residual_update(x, [feature] * 3).x
            del x, feature
            torch.full(
                (2, 256, 512), float("nan"), device=device, dtype=torch.bfloat16
            )  # takes the memory that was freed
            torch.full((2, 256, 512), float("nan"), device=device, dtype=torch.bfloat16)
            kept.append(out)
    side.synchronize()
    assert (
        [float(out.min()) for out in kept]
        == [float(out.max()) for out in kept]
        == [step + 6.0 for step in range(50)]
    )


@each_kernel_backend
@pytest.mark.parametrize(
    "form",
    [UPDATES["all"], SCATTERS["refresh-all"], UPDATES["errors-only"]],
    ids=["all", "refresh-all", "errors"],
)
def test_no_call_waits_for_the_gpu(form: Form, backend: str, device: torch.device) -> None:
    call = build(form.of(PRECISIONS["bf16"]), device)
    call.run(available(backend))  # compilation and tables of addresses may wait, once
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_self_check_is_not_disturbed_by_a_ban_on_waiting(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_AGREED", {})
    expected = next(name for name in backends.ORDER["cuda"] if backends.status()[name].available)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert backends.chosen_name(device) == expected
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode(0)


@each_kernel_backend
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="one GPU: the guard of another device is not tested"
)
def test_tensors_of_another_device_than_the_current_one(backend: str) -> None:
    available(backend)
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for form in (UPDATES["all"], SCATTERS["refresh-all"]):
            expected = build(form, torch.device("cuda", 0)).run(backend)
            found = build(form, other).run(backend)
            assert torch.cuda.current_device() == 0
            assert all(tensor.device == other for tensor in found if tensor is not None)
            assert_same_bits(
                tuple(None if tensor is None else tensor.cpu() for tensor in found),
                tuple(None if tensor is None else tensor.cpu() for tensor in expected),
            )


@each_kernel_backend
def test_a_tensor_on_another_kind_of_device_is_refused_by_name(backend: str, device: torch.device) -> None:
    x = torch.zeros(1, 2, 8, device=device)
    with (
        use_backend(available(backend)),
        pytest.raises((ValueError, RuntimeError), match=r"features\[0\]: expected on "),
    ):
        residual_update(x, torch.zeros(1, 2, 8))


# --- more than 2^31 elements ---------------------------------------------------------------------


@each_kernel_backend
@pytest.mark.parametrize("modulate", [False, True], ids=["sum", "rows"])
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 1, 64), (2**31 + 64, 64, 1)), ((1, 2, 64), (64, 2**31 + 64, 1))],
    ids=["batch", "token"],
)
def test_strides_beyond_two_to_the_31_elements(
    shape: tuple[int, ...], strides: tuple[int, ...], modulate: bool, backend: str, device: torch.device
) -> None:
    available(backend)
    x = needed(2**31 + 256, device).as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    with use_backend(backend):
        found = residual_update(x, x, norm=3 if modulate else 0)
    assert_same_bits(found.x, (x + x).contiguous())
    if modulate:
        assert_same_bits(found.h, found.x)


@each_kernel_backend
def test_a_stream_of_more_than_two_to_the_31_elements(backend: str, device: torch.device) -> None:
    available(backend)
    D = 1024
    N = 2**31 // D + 64
    x, feature = needed(N * D, device, 3).view(1, N, D), needed(N * D, device).view(1, N, D)
    places = [slice(0, 3), slice(2**31 // D - 2, 2**31 // D + 2), slice(N - 3, N)]
    x.zero_(), feature.zero_()
    for place in places:
        x[:, place].normal_(), feature[:, place].normal_()
    with use_backend(backend):
        found = residual_update(x, feature).x
    for place in places:
        assert_same_bits(found[:, place].contiguous(), (x[:, place] + feature[:, place]).contiguous())


def needed(elements: int, device: torch.device, tensors: int = 1) -> Tensor:
    """bf16 memory; skips the test if `tensors` of that size do not fit."""
    free = torch.cuda.mem_get_info(device)[0]
    if 2 * elements * tensors > 0.8 * free:
        pytest.skip(f"needs {2e-9 * elements * tensors:.0f} GB of GPU memory, {1e-9 * free:.0f} GB are free")
    return torch.empty(elements, dtype=torch.bfloat16, device=device)
