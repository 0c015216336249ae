"""A GPU backend proves itself once per process and device before it is used."""
from types import ModuleType

import torch

from fastcache.backends import eager


def disagreement(backend: ModuleType, device: torch.device) -> str:
    """Run small cases of both operators on `backend` and on eager; what differs, or "" if nothing does."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator).to(device, torch.float32)  # noqa: E731
    B, N, D, K = 2, 19, 136, 5
    x, features, gates = make(B, N, D), [make(B, N, D) for _ in range(3)], make(4, B, D)
    index = torch.tensor([2, -1, 0, 3], dtype=torch.int32, device=device)
    slots = torch.full((B, N), -1, dtype=torch.int32)
    for b in range(B):
        slots[b, torch.randperm(N, generator=generator)[:K]] = torch.arange(K, dtype=torch.int32)
    slots, fresh, slot = slots.to(device), make(B, K, D), make(B, N, D)
    modulate = dict(norm=1, shift=gates[0], scale=gates[1])
    cases = {
        "sum": lambda run, slot: run.residual_update(x, features, gates, index[:3]),
        "modulate": lambda run, slot: run.residual_update(x, features[:1], gates[2], **modulate),
        "selected rows": lambda run, slot: run.residual_update(x, features, gates, index[:3], row_slots=slots, row_count=K, **modulate),
        "refresh": lambda run, slot: run.residual_update_scatter_(x, slot, fresh, slots, features, 1, None, gates, index),
    }
    for name, case in cases.items():
        written = [slot.clone(), slot.clone()]
        try:
            found, expected = case(backend, written[0]), case(eager, written[1])
            for a, b in zip((*found, written[0]), (*expected, written[1]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        except Exception as error:  # whatever it is, the backend is not to be used
            return f"{name}: {str(error).strip().splitlines()[0]}"
    return ""
