"""The proof of a host's blocks runs aside: hooks, dispatch modes and random numbers do not see it."""

import copy

import pytest
import torch
from hosts import STEPS, ForeignBlock, foreign_dit, inputs, run, small_dit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache

POLICY = fastcache.FORA(interval=3)


class Scaled(ForeignBlock):
    """LayerScale, which no attribute tells."""

    def forward(self, x, c):
        return x + 0.5 * (super().forward(x, c) - x)


def scaled(numbers: tuple[int, ...]):
    model = foreign_dit()
    for number in numbers:
        model.blocks[number].__class__ = Scaled
    return model


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (2,)], ids=["every block", "one block"])
def test_a_block_that_is_not_what_its_parts_say_is_an_error_at_the_first_call(numbers) -> None:
    model = scaled(numbers)
    with pytest.raises(fastcache.HostError, match=rf"blocks\[{numbers[0]}\] \(Scaled\)"):
        with fastcache.accelerate(model, POLICY, STEPS):
            run(model, 1)
    assert "forward" not in model.__dict__


def test_the_proof_can_be_turned_off() -> None:
    model = scaled((0,))
    with fastcache.accelerate(model, POLICY, STEPS, prove=False):
        run(model)


def test_gates_of_zero_prove_nothing_and_the_summary_says_so() -> None:
    model = small_dit()
    for block in model.blocks:
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        run(model)
    assert session.summary().unproven == 1 and "unproven" in str(session.summary())


class Bodies(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def test_neither_hooks_nor_dispatch_modes_see_it() -> None:
    model, seen, counts = small_dit(), [], []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(1))
    for prove in (False, True):
        seen.clear()
        with fastcache.accelerate(model, POLICY, STEPS, prove=prove), Bodies() as bodies:
            run(model)
        counts.append((len(seen), bodies.count))
    assert counts[0] == counts[1] and counts[0][1] > 0


def test_random_numbers_and_outputs_are_those_without_it() -> None:
    model = small_dit()
    for block in model.blocks:
        block.attn = nn.Sequential(block.attn, nn.Dropout(0.5)).train()
    outputs = []
    for prove in (False, True):
        torch.manual_seed(3)
        with fastcache.accelerate(copy.deepcopy(model), POLICY, STEPS, prove=prove) as session:
            outputs.append([*run(session.host.model), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    for depth in (1, 3):
        model = small_dit(dtype=dtype, depth=depth)
        with fastcache.accelerate(model, POLICY, STEPS) as session, torch.no_grad():
            for step in range(STEPS):
                model(*inputs(step, dtype=dtype))
        assert session.summary().unproven == 0


def test_blocks_of_one_structure_are_proven_once_a_session() -> None:
    model, asked = small_dit(), []
    with fastcache.accelerate(model, POLICY, STEPS) as session:
        both_ways = session._proof._both_ways
        session._proof._both_ways = lambda *args: asked.append(1) or both_ways(*args)
        run(model)
        run(model)
    assert asked == [1]
