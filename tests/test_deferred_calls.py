"""Whatever a host calls with the tensor between two blocks gives what it gives with a plain tensor."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equal_or_loud import POLICY, assert_equal, defined
from hosts import foreign_dit, run
from torch import Tensor

import fastcache

WIDTH, STEPS, DEPTH = 24, 3, 2  # two full steps and one that reuses
FULL = POLICY.full_steps(STEPS)
FIRST = torch.zeros(4, 1, WIDTH, dtype=torch.long)

METADATA = {
    "numel(input=)": lambda x: torch.numel(input=x),
    "numel()": lambda x: torch.numel(x),
    "is_floating_point(input=)": lambda x: torch.is_floating_point(input=x),
    "is_complex(input=)": lambda x: torch.is_complex(input=x),
    "is_conj(input=)": lambda x: torch.is_conj(input=x),
    "is_nonzero of a part": lambda x: torch.is_nonzero(input=x[0, 0, 0]),
    "is_same_size(input=, other=)": lambda x: torch.is_same_size(input=x, other=x),
    "is_signed": lambda x: x.is_signed(),
    "size(dim=)": lambda x: x.size(dim=1),
    "size()": lambda x: tuple(x.size()),
    "stride(dim=)": lambda x: x.stride(dim=1),
    "stride()": lambda x: x.stride(),
    "storage_offset()": lambda x: x.storage_offset(),
    "is_contiguous(memory_format=)": lambda x: x.is_contiguous(memory_format=torch.contiguous_format),
    "dim()": lambda x: x.dim(),
    "ndimension()": lambda x: x.ndimension(),
    "nbytes": lambda x: x.nbytes,
    "itemsize": lambda x: x.itemsize,
    "element_size()": lambda x: x.element_size(),
    "len": len,
    "device": lambda x: x.device,
    "get_device()": lambda x: x.get_device(),
    "dtype": lambda x: x.dtype,
    "type()": lambda x: x.type(),
    "layout": lambda x: x.layout,
    "is_inference()": lambda x: x.is_inference(),
    "is_leaf": lambda x: x.is_leaf,
    "requires_grad": lambda x: x.requires_grad,
    "result_type(tensor=, other=)": lambda x: torch.result_type(tensor=x, other=1),
    "shape of a broadcast": lambda x: torch.broadcast_shapes(x.shape, (1,)),
}

BY_KEYWORD = {
    "layer_norm(input=)": lambda x: F.layer_norm(input=x, normalized_shape=(WIDTH,)),
    "linear(input=)": lambda x: F.linear(input=x, weight=torch.eye(WIDTH)),
    "scaled_dot_product_attention(query=, key=, value=)": lambda x: F.scaled_dot_product_attention(
        query=x, key=x, value=x
    ),
    "add(input=, other=)": lambda x: torch.add(input=x, other=x, alpha=2),
    "mul of a plain tensor(other=)": lambda x: torch.mul(input=torch.ones(WIDTH), other=x),
    "cat(tensors=)": lambda x: torch.cat(tensors=[x, x], dim=1),
    "split(tensor=)": lambda x: torch.split(tensor=x, split_size_or_sections=32, dim=1)[1],
    "einsum of a list": lambda x: torch.einsum("bnd,bmd->bnm", [x, x]),
    "gather(index of it)": lambda x: torch.gather(
        input=x, dim=1, index=torch.zeros(4, 1, WIDTH, dtype=torch.long)
    ),
    "add(out=)": lambda x: torch.add(input=x, other=1, out=torch.empty(4, 64, WIDTH)),
    "Tensor.add": lambda x: Tensor.add(x, other=x),
    "__radd__": lambda x: 1 + x,
    "torch.ops by keyword": lambda x: torch.ops.aten.relu.default(self=x),
    "vmap": lambda x: torch.func.vmap(lambda row: row.sum(-1))(x),
    "asarray": lambda x: torch.asarray(x),
    "from_dlpack": lambda x: torch.from_dlpack(x),
    "np.asarray": lambda x: torch.from_numpy(np.asarray(x).copy()),
    "data": lambda x: x.data,
    "to(dtype=)": lambda x: x.to(dtype=torch.float64),
    "copy_ into a plain tensor": lambda x: torch.empty(4, 64, WIDTH).copy_(x),
    "index_put(values=)": lambda x: torch.zeros(4, 64, WIDTH).index_put((torch.arange(4),), values=x),
    "deepcopy": lambda x: copy.deepcopy(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "untyped_storage": lambda x: torch.tensor(x.untyped_storage().nbytes()),
}


def called_between_blocks(call: Callable[[Tensor], Any]) -> list[tuple[Any, Any]]:
    """(result with what a block handed on, result with a plain tensor), for all steps and blocks."""
    results, kinds = [], set()

    def between(index: int, x: Tensor) -> Tensor:
        kinds.add(type(x))
        found = call(x)
        plain = torch.empty(x.shape).copy_(x)
        results.append((found, call(plain)))
        return x

    model = foreign_dit(between, DEPTH)
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model, STEPS)
    assert len(kinds) == 2, "no deferred tensor was seen: nothing is tested"
    assert_equal(found, defined(foreign_dit(depth=DEPTH), FULL, STEPS))
    return results


@pytest.mark.parametrize("call", METADATA.values(), ids=METADATA)
def test_what_a_host_asks_about_the_stream_is_answered_as_for_a_plain_tensor(call: Callable) -> None:
    for found, expected in called_between_blocks(call):
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("call", BY_KEYWORD.values(), ids=BY_KEYWORD)
def test_what_a_host_computes_of_the_stream_is_that_of_a_plain_tensor(call: Callable) -> None:
    for found, expected in called_between_blocks(call):
        assert found.dtype == expected.dtype and torch.equal(
            torch.empty_like(expected).copy_(found), expected
        )


def set_by_out(index: int, x: Tensor) -> Tensor:
    torch.add(input=x, other=1.0, out=x)
    return x


def written_through_an_inplace_function(index: int, x: Tensor) -> Tensor:
    return F.relu(input=x, inplace=True)


def set_by_data(index: int, x: Tensor) -> Tensor:
    x.data = x.data * 0.5
    return x


def written_through_data(index: int, x: Tensor) -> Tensor:
    x.data.mul_(0.5)
    return x


def written_through_detach(index: int, x: Tensor) -> Tensor:
    x.detach().mul_(0.5)
    return x


def written_through_numpy(index: int, x: Tensor) -> Tensor:
    x.numpy()[:, 0] = 0.5
    return x


def written_by_a_list_operator(index: int, x: Tensor) -> Tensor:
    torch._foreach_mul_([x], 0.5)
    return x


def written_by_copy(index: int, x: Tensor) -> Tensor:
    x.copy_(torch.ones(x.shape[-1]))
    return x


def written_by_init(index: int, x: Tensor) -> Tensor:
    return torch.nn.init.constant_(tensor=x, val=0.25)


def set_as_an_item(index: int, x: Tensor) -> Tensor:
    x[..., ::2] = x[..., 1::2]
    return x


WRITES = [
    set_by_out,
    written_through_an_inplace_function,
    set_by_data,
    written_through_data,
    written_through_detach,
    written_through_numpy,
    written_by_a_list_operator,
    written_by_copy,
    written_by_init,
    set_as_an_item,
]


@pytest.mark.parametrize("between", WRITES)
def test_what_a_host_writes_into_the_stream_reaches_the_next_block(between: Callable) -> None:
    model = foreign_dit(between, DEPTH)
    with fastcache.accelerate(model, POLICY, STEPS):
        found = run(model, STEPS)
    assert_equal(found, defined(foreign_dit(between, DEPTH), FULL, STEPS))
