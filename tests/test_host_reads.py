"""After its first model call a session never waits for the device: no value is read back."""

from collections import Counter

import pytest
import torch
from hosts import inputs, small_dit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache

STEPS, GENERATIONS = 4, 3
READS = (
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::unique",
)
ROW = [1, 0, 1, 0]
POLICIES = {
    "FORA": fastcache.FORA(interval=3),
    "ToCa": fastcache.ToCa(fresh_threshold=3, fresh_ratio=0.3),
    "DuCa": fastcache.DuCa(fresh_threshold=3, fresh_ratio=0.3),
    "TaylorSeer": fastcache.TaylorSeer(interval=3, max_order=2),
    "SmoothCache": fastcache.SmoothCache({"attn": ROW, "mlp": ROW}),
}


class Dispatched(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            self.names["aten::nonzero"] += any(
                each is not None and each.dtype == torch.bool for each in args[1]
            )
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> dict[str, int]:
        """What waited for the device."""
        return {name: count for name, count in self.names.items() if name in READS and count}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: float(x),
        lambda x: torch.equal(x, x),
        lambda x: torch.allclose(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0])[torch.tensor([True, False])],
    ],
    ids=["item", "bool", "float", "equal", "allclose", "nonzero", "mask"],
)
def test_a_read_is_seen(read) -> None:
    x = torch.tensor(3.0)
    with Dispatched() as seen:
        read(x)
    assert seen.reads


def generation(model: nn.Module, calls: int, first_alone: bool, seen: Dispatched) -> list[Tensor]:
    """One generation whose model calls are watched, the first one on request not."""
    outputs = []
    for step in range(STEPS):
        x, t, y = inputs(step, 2)
        for call in range(calls):
            if first_alone and not outputs:
                outputs.append(model(x, t, y))
                continue
            with seen:
                outputs.append(model(x + call, t, y))
    return outputs


@pytest.mark.parametrize("announced", [False, True], ids=["not begun", "begun"])
@pytest.mark.parametrize(
    ("declared", "calls"), [(None, 1), (None, 2), (1, 1), (2, 2)], ids=["1 found", "2 found", "1", "2"]
)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_call_after_the_first_reads_a_value_back(
    policy: fastcache.Policy, declared: int | None, calls: int, announced: bool
) -> None:
    model, seen = small_dit(depth=2), Dispatched()
    timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
    with fastcache.accelerate(model, policy, STEPS, calls_per_step=declared) as session, torch.no_grad():
        for number in range(GENERATIONS):
            if announced:
                session.begin(timesteps=timesteps, conditions={"y": inputs(0, 2)[2]})
            generation(model, calls, number == 0, seen)
    assert session.summary().generations == GENERATIONS
    assert sum(seen.names.values()) > STEPS * GENERATIONS * calls  # the mode saw the model's own operators
    assert not seen.reads, seen.reads


@pytest.mark.parametrize("how", ["begin", "step"])
def test_a_session_that_is_only_told_where_it_is_reads_nothing_back(how: str) -> None:
    model, seen = small_dit(depth=2), Dispatched()
    with fastcache.accelerate(model, POLICIES["FORA"], STEPS) as session, torch.no_grad():
        for number in range(GENERATIONS):
            if how == "begin":
                session.begin()
                generation(model, 1, number == 0, seen)
                continue
            for step in range(STEPS):
                session.step(step)
                if number or step:
                    with seen:
                        model(*inputs(step, 2))
                else:
                    model(*inputs(step, 2))
    assert sum(seen.names.values()) > STEPS * GENERATIONS and not seen.reads, seen.reads


@pytest.mark.parametrize("change", ["batch", "weights", "reset"])
def test_what_changes_between_generations_is_followed_without_a_read(change: str) -> None:
    model, seen = small_dit(depth=2), Dispatched()
    with fastcache.accelerate(model, POLICIES["ToCa"], STEPS, calls_per_step=1) as session, torch.no_grad():
        generation(model, 1, True, seen)
        if change == "reset":
            session.reset()
        if change == "weights":
            model.blocks[0].adaLN_modulation[1].weight.data.mul_(0.5)
        with seen:
            for step in range(STEPS):
                model(*inputs(step, 4 if change == "batch" else 2))
    assert seen.names and not seen.reads, seen.reads


def test_timesteps_in_half_precision_are_compared_without_a_read() -> None:
    model, seen = small_dit(depth=2, dtype=torch.bfloat16), Dispatched()
    timesteps = torch.stack([inputs(step)[1][0] for step in range(STEPS)])
    with fastcache.accelerate(model, POLICIES["FORA"], STEPS) as session, torch.no_grad():
        for number in range(GENERATIONS):
            session.begin(timesteps=timesteps, conditions={"y": inputs(0, 2)[2]})
            for step in range(STEPS):
                if number or step:
                    with seen:
                        model(*inputs(step, 2, dtype=torch.bfloat16))
                else:
                    model(*inputs(step, 2, dtype=torch.bfloat16))
    assert seen.names and not seen.reads, seen.reads
