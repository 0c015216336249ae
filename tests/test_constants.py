"""Small device tensors of host values: uploaded once by their owner, and kept by nobody else."""

import gc
import weakref

import torch
from hosts import STEPS, run, small_dit

import fastcache
from fastcache.backends.constants import Constants, constant_row

CPU = torch.device("cpu")


def test_an_owner_uploads_once() -> None:
    owner = Constants()
    with owner.in_use():
        first, second = (constant_row((1, 2), torch.int32, CPU) for _ in range(2))
        other = constant_row((1, 2), torch.float32, CPU)
    assert first is second and other is not first and len(owner) == 2 and owner.nbytes == 16


def test_without_an_owner_nothing_is_kept() -> None:
    kept = weakref.ref(constant_row((1, 2), torch.int32, CPU))
    gc.collect()
    assert kept() is None


def test_an_owner_that_is_done_is_no_owner() -> None:
    owner = Constants()
    with owner.in_use():
        pass
    constant_row((7,), torch.int32, CPU)
    assert len(owner) == 0


def test_steps_that_never_repeat_do_not_fill_the_memory() -> None:
    owner = Constants()
    with owner.in_use():
        for value in range(9000):
            constant_row((value,), torch.int32, CPU)
    assert len(owner) <= 8192


def test_a_second_generation_uploads_nothing_and_a_closed_session_keeps_nothing() -> None:
    model = small_dit()
    with fastcache.accelerate(model, fastcache.TaylorSeer(3, 2), STEPS) as session:
        run(model)
        uploaded = len(session._constants)
        run(model)
        assert len(session._constants) == uploaded > 0
    assert len(session._constants) == 0
