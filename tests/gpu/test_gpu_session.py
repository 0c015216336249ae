"""A session on a GPU: what it computes, and how little it launches."""

import hosts
import pytest
import torch
from on_device import available
from torch.profiler import DeviceType, ProfilerActivity, profile

from fastcache import FORA, accelerate, use_backend
from fastcache.models import DiT

STEPS, INTERVAL = hosts.STEPS, 3
KERNELS_OF_OURS = ("sum_kernel", "row_kernel")


@torch.no_grad()
def outputs(model: DiT, device: torch.device, *, begin: bool) -> list[torch.Tensor]:
    """Every output of a generation under FORA, on the CPU."""
    calls = [tuple(tensor.to(device) for tensor in hosts.inputs(step)) for step in range(STEPS)]
    with accelerate(model, FORA(interval=INTERVAL), STEPS, calls_per_step=1) as session:
        if begin:
            session.begin(timesteps=torch.stack([t[0] for _, t, _ in calls]), conditions={"y": calls[0][2]})
        return [model(*call).cpu() for call in calls]


@pytest.mark.parametrize("begin", [False, True], ids=["unannounced", "begun"])
@pytest.mark.parametrize("backend", ["cuda", "triton", "eager"])
def test_fora_on_a_gpu_equals_eager_on_a_cpu(backend: str, begin: bool, device: torch.device) -> None:
    available(backend)
    with use_backend("eager"):
        expected = outputs(hosts.small_dit(), torch.device("cpu"), begin=begin)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with use_backend(backend):
            found = outputs(hosts.small_dit().to(device), device, begin=begin)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def kernels(call) -> list[str]:
    """Names of the kernels that a call launched."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@torch.no_grad()
def test_a_reuse_step_launches_one_kernel_for_the_whole_trunk(backend: str, device: torch.device) -> None:
    model = hosts.small_dit(depth=5).to(device)
    calls = [tuple(tensor.to(device) for tensor in hosts.inputs(step)) for step in range(STEPS)]
    with (
        use_backend(available(backend)),
        accelerate(model, FORA(interval=STEPS), STEPS, calls_per_step=1, count_ops=False) as session,
    ):
        session.begin(timesteps=torch.stack([t[0] for _, t, _ in calls]), conditions={"y": calls[0][2]})
        model(*calls[0])
        model(*calls[1])  # compiles, and copies tables of addresses
        launched = kernels(lambda: model(*calls[2]))
        full = kernels(lambda: (session.step(0), model(*calls[0])))
        session.reset()
    ours = [name for name in launched if any(kernel in name for kernel in KERNELS_OF_OURS)]
    assert len(ours) == 1, launched
    assert len(launched) < len(full) - 5 * 10, (len(launched), len(full))


@torch.no_grad()
def test_the_reuse_step_can_be_captured_and_replayed_on_other_inputs(device: torch.device) -> None:
    model = hosts.small_dit().to(device)
    calls = [tuple(tensor.to(device) for tensor in hosts.inputs(step)) for step in range(STEPS)]
    with accelerate(model, FORA(interval=STEPS), STEPS, calls_per_step=1, count_ops=False) as session:
        session.begin(timesteps=torch.stack([t[0] for _, t, _ in calls]), conditions={"y": calls[0][2]})
        model(*calls[0])
        x, t, y = (tensor.clone() for tensor in calls[1])
        for _ in range(2):
            session.step(1)
            model(x, t, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        session.step(1)
        with torch.cuda.graph(graph):
            found = model(x, t, y)
        x.copy_(calls[5][0])
        session.step(1)
        expected = model(x, t, y)
        graph.replay()
        torch.testing.assert_close(found, expected)
        session.reset()
