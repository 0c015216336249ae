"""Calls of tests/cases.py on a GPU: the same values, strides and sentinels, in the memory of a device."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import cases
import pytest
import torch
from torch import Tensor

import fastcache

KERNELS = ("cuda", "triton")
STAND_INS = {"cuda": "cpp", "triton": "eager", "eager": "eager"}  # of a rehearsal on a CPU


def available(name: str) -> str:
    """The name, if that backend runs here; skips the test with the reason otherwise."""
    if not torch.cuda.is_available():
        name = STAND_INS[name] if fastcache.backends_status()[STAND_INS[name]].available else "eager"
    status = fastcache.backends_status()[name]
    if not status.available:
        pytest.skip(f"backend {name}: {status.reason}")
    return name


def each_kernel_backend(test: Callable) -> Callable:
    """Parametrise over the backends with kernels of ours; see `available`."""
    return pytest.mark.parametrize("backend", KERNELS)(test)


def moved(call: cases.Call, device: torch.device) -> cases.Call:
    """A call whose tensors are views of equal buffers on `device`."""
    buffers = {name: buffer.to(device) for name, buffer in call.buffers.items()}

    def view(name: str, tensor: Tensor) -> Tensor:
        return buffers[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    arguments = {
        name: view(name, value) if isinstance(value, Tensor) else value
        for name, value in call.arguments.items()
    }
    arguments["features"] = [
        view(f"features[{j}]", feature) for j, feature in enumerate(call.arguments["features"])
    ]
    return replace(call, arguments=arguments, buffers=buffers)


def build(form: cases.Form, device: torch.device) -> cases.Call:
    """`cases.build` on a device."""
    return moved(cases.build(form), device)


def built_on(device: torch.device) -> AbstractContextManager:
    """Let `cases.verify` and its kin build their calls on `device`."""
    original = cases.build
    return patch.object(cases, "build", lambda form: moved(original(form), device))


def verify(form: cases.Form, backend: str, device: torch.device) -> None:
    """`cases.verify` on a device: outputs against float64, stored bytes, sentinels."""
    with built_on(device), torch.no_grad():
        cases.verify(form, available(backend))


def refilled(call: cases.Call, seed: int) -> None:
    """Overwrite the floating operands of a call, in place, by other values; index tensors stay."""
    other = moved(cases.build(replace(call.form, seed=seed)), call.arguments["x"].device)
    for name, tensor in call.tensors().items():
        if tensor.is_floating_point():
            target, source = tensor, other.tensors()[name]
            if tensor.dtype is torch.float8_e4m3fn:
                target, source = target.view(torch.uint8), source.view(torch.uint8)
            target.copy_(source)
