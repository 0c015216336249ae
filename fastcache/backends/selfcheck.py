"""A GPU backend proves each of its operators once per process and device before it runs it.

The check launches kernels, waits for them and compares values, so it must not be seen by what the
caller is doing: never inside a graph capture or a trace (`possible`), and not by modes that count,
record or fake the caller's operators (`_undisturbed`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastcache.backends import eager

Case = Callable[[ModuleType], tuple[torch.Tensor, ...]]
TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def possible() -> bool:
    """False while a CUDA graph is captured, or while a tracer or fake tensors stand for values."""
    if torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(key) is not None for key in TRACERS):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def disagreement(backend: ModuleType, device: torch.device, operator: str) -> str:
    """Run small cases of an operator on `backend` and on eager; what differs, or "" if nothing does.

    Raises RuntimeError where the check is not possible.
    """
    if not possible():
        raise RuntimeError(
            "selfcheck: a backend cannot be checked inside a CUDA graph capture or a trace; call an operator"
            " once before it"
        )
    with _undisturbed(device):
        return _disagreement(backend, device, operator)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Outside of the caller's dispatch modes, default device, autocast and ban on synchronisation."""
    strict = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if strict:
            torch.cuda.set_sync_debug_mode(0)
        with (
            _disable_current_modes(),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.device("cpu"),
        ):
            yield
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode(strict)


def _disagreement(backend: ModuleType, device: torch.device, operator: str) -> str:
    for own, name, case in (*_stream_cases(device), *_token_cases(device)):
        if own != operator:
            continue
        try:
            for a, b in zip(case(backend), case(eager), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        except Exception as error:  # whatever it is, the backend is not to be used
            return f"{name}: {str(error).strip().splitlines()[0]}"
    return ""


def _random(device: torch.device) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, torch.float32)


def _stream_cases(device: torch.device) -> list[tuple[str, str, Case]]:
    make = _random(device)
    B, N, D, K = 2, 19, 136, 5
    x, features, gates = make(B, N, D), [make(B, N, D) for _ in range(3)], make(4, B, D)
    index = torch.tensor([2, -1, 0, 3], dtype=torch.int32, device=device)
    slots = torch.full((B, N), -1, dtype=torch.int32)
    for b in range(B):
        slots[b, torch.randperm(N, generator=torch.Generator().manual_seed(b))[:K]] = torch.arange(
            K, dtype=torch.int32
        )
    slots, fresh, slot = slots.to(device), make(B, K, D), make(B, N, D)
    modulate = dict(norm=1, shift=gates[0], scale=gates[1])

    def refresh(run: ModuleType) -> tuple[torch.Tensor, ...]:
        own = slot.clone()
        return (*run.residual_update_scatter_(x, own, fresh, slots, features, 1, None, gates, index), own)

    update = "residual_update"
    return [
        (update, "sum", lambda run: run.residual_update(x, features, gates, index[:3])),
        (update, "modulate", lambda run: run.residual_update(x, features[:1], gates[2], **modulate)),
        (
            update,
            "selected rows",
            lambda run: run.residual_update(
                x, features, gates, index[:3], row_slots=slots, row_count=K, **modulate
            ),
        ),
        ("residual_update_scatter_", "refresh", refresh),
    ]


def _token_cases(device: torch.device) -> list[tuple[str, str, Case]]:
    make = _random(device)
    x, y, v, score = make(2, 19, 136), make(2, 19, 136), make(2, 3, 19, 40), make(3, 1200).round()
    age = torch.arange(3600, dtype=torch.int32, device=device).remainder(5).view(3, 1200)
    counts = torch.tensor([0, 700, 1200], dtype=torch.int32, device=device)

    def select(run: ModuleType) -> tuple[torch.Tensor, ...]:
        own = age.clone()
        return (*run.select_tokens_(score, own, counts, 1200, 0.1, True, 40, 2, 0.5), own)

    return [
        ("select_tokens_", "select tokens", select),
        ("row_score", "norm of tokens", lambda run: (run.row_score(x),)),
        ("row_score", "distance of tokens", lambda run: (run.row_score(x, y),)),
        ("value_norm", "norm of values", lambda run: (run.value_norm(v),)),
        ("attention_received", "attention received", lambda run: (run.attention_received(v, v[:, :, :13]),)),
        ("relative_error", "relative error", lambda run: (run.relative_error([x, y], [y, x, x, x]),)),
    ]
