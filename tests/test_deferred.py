"""Deferred: a host that looks between blocks is slower, never wrong."""

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits, laid_out, random_values
from torch import Tensor

import fastcache.stream.deferred
from fastcache import ResidualStream
from fastcache.stream.deferred import Deferred

B, N, D = 2, 6, 24
X, FEATURE, GATE, OTHER = (
    random_values(shape, "float32", seed)
    for seed, shape in enumerate([(B, N, D), (B, N, D), (B, D), (B, N, D)])
)


def pending(x: Tensor = X) -> ResidualStream:
    """A stream with one queued update."""
    stream = ResidualStream(x)
    stream.add(FEATURE, GATE)
    return stream


@pytest.fixture
def deferred() -> Deferred:
    return Deferred(pending())


@pytest.fixture
def expected() -> Tensor:
    return pending().value()


# what a host may do with x, from any tensor like it; y is a second tensor
READS = {
    "element": lambda x: x[1, 2, 3],
    "item": lambda x: x[1, 2, 3].item(),
    "slice": lambda x: x[:, 1:3, ::2],
    "mask": lambda x: x[x > 0],
    "index-tensor": lambda x: x[torch.tensor([1, 0])],
    "tolist": lambda x: x.tolist(),
    "iterate": lambda x: [row.sum() for row in x],
    "unpack": lambda x: torch.stack([*x]),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "max": lambda x: tuple(x.max(1)),
    "norm": lambda x: torch.linalg.vector_norm(x),
    "var-mean": lambda x: torch.var_mean(x, -1),
    "plus-number": lambda x: x + 1,
    "number-minus": lambda x: 1 - x,
    "number-over": lambda x: 1 / x,
    "plus-tensor": lambda x: x + OTHER,
    "tensor-plus": lambda x: OTHER + x,
    "tensor-times": lambda x: OTHER * x,
    "compare": lambda x: x > OTHER,
    "equal": lambda x: torch.equal(x, x),
    "matmul": lambda x: x @ OTHER.transpose(1, 2),
    "rmatmul": lambda x: OTHER.transpose(1, 2) @ x,
    "negate": lambda x: -x,
    "abs": lambda x: abs(x),
    "power": lambda x: x**2,
    "with-itself": lambda x: x * x,
    "cat": lambda x: torch.cat([x, OTHER, x], 1),
    "stack": lambda x: torch.stack((OTHER, x)),
    "where": lambda x: torch.where(x > 0, x, OTHER),
    "einsum": lambda x: torch.einsum("bnd,bmd->bnm", x, OTHER),
    "lerp": lambda x: torch.lerp(OTHER, x, 0.25),
    "addcmul": lambda x: torch.addcmul(OTHER, x, x, value=0.5),
    "gather": lambda x: x.gather(1, torch.zeros(B, 2, D, dtype=torch.long)),
    "index-select": lambda x: x.index_select(1, torch.tensor([5, 0])),
    "masked-fill": lambda x: x.masked_fill(OTHER > 0, 0.0),
    "topk": lambda x: tuple(x.topk(3)),
    "sort": lambda x: tuple(x.sort(-1)),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "contiguous": lambda x: x.contiguous(),
    "to-dtype": lambda x: x.to(torch.bfloat16),
    "to-device": lambda x: x.to("cpu"),
    "to-like": lambda x: x.to(OTHER.double()),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "type-as": lambda x: x.type_as(OTHER.half()),
    "cpu": lambda x: x.cpu(),
    "view": lambda x: x.view(B, -1),
    "view-dtype": lambda x: x.view(torch.int32),
    "reshape": lambda x: x.reshape(-1, D),
    "flatten": lambda x: x.flatten(1),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x[:1].expand(3, -1, -1),
    "chunk": lambda x: x.chunk(3, -1),
    "unbind": lambda x: x.unbind(0),
    "split": lambda x: torch.split(x, [1, 5], 1),
    "as-strided": lambda x: x.as_strided((3, 4), (4, 1)),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "roll": lambda x: x.roll(1, 1),
    "pad": lambda x: F.pad(x, (0, 0, 1, 1)),
    "layer-norm": lambda x: F.layer_norm(x, (D,)),
    "linear": lambda x: F.linear(x, OTHER[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, OTHER),
    "module": lambda x: torch.nn.GELU()(x),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x, dtype=np.float64),
    "numpy-function": lambda x: np.sum(x.numpy(), axis=1),
    "dlpack": lambda x: torch.from_dlpack(x),
    "copy": lambda x: copy.copy(x),
    "deepcopy": lambda x: copy.deepcopy(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": lambda x: saved_and_loaded(x),
    "copy-from": lambda x: torch.empty(B, N, D).copy_(x),
    "add-to-other": lambda x: OTHER.clone().add_(x),
    "set-in-other": lambda x: set_in_other(x),
    "out-of-other": lambda x: torch.add(x, 1, out=torch.empty(B, N, D)),
    "index-add": lambda x: torch.zeros(B, N, D).index_add_(0, torch.tensor([1, 0]), x),
    "foreach": lambda x: torch._foreach_add([x, OTHER], 1.0),
    "new-tensor": lambda x: torch.tensor(x.tolist()),
    "storage": lambda x: x.untyped_storage().nbytes(),
    "isnan": lambda x: bool(torch.isnan(x).any()),
    "allclose": lambda x: torch.allclose(OTHER, x),
    "keyword": lambda x: torch.add(input=x, other=OTHER),
    "nested": lambda x: torch.block_diag(*[x[0], x[1]]),
    "vmap": lambda x: torch.vmap(torch.sum)(x),
    "bitwise-hash": lambda x: x.numpy().tobytes(),
    "format-element": lambda x: f"{x[0, 0, 0]:.6f}",
    "format": lambda x: f"{x}",
}
# what changes x in place, and must be seen by every later read
WRITES = {
    "iadd": lambda x: x.add_(1),
    "imul-by-tensor": lambda x: x.mul_(OTHER),
    "operator-iadd": lambda x: x.__iadd__(OTHER),
    "zero": lambda x: x.zero_(),
    "fill": lambda x: x.fill_(3.0),
    "copy": lambda x: x.copy_(OTHER),
    "setitem": lambda x: x.__setitem__((slice(None), 0), 7.0),
    "setitem-tensor": lambda x: x.__setitem__((0, slice(1, 3)), OTHER[0, 1:3]),
    "setitem-mask": lambda x: x.__setitem__(OTHER > 0, 0.0),
    "setitem-index": lambda x: x.__setitem__(torch.tensor([1]), OTHER[:1]),
    "view-in-place": lambda x: x[0, 1].add_(5),
    "chunk-in-place": lambda x: x.chunk(2, -1)[1].mul_(2),
    "reshape-in-place": lambda x: x.view(-1)[::3].neg_(),
    "transposed-in-place": lambda x: x.transpose(1, 2).add_(1),
    "data-in-place": lambda x: x.data.mul_(2),
    "detached-in-place": lambda x: x.detach().mul_(2),
    "numpy-in-place": lambda x: x.numpy().__imul__(2),
    "out": lambda x: torch.add(OTHER, 1, out=x),
    "out-of-itself": lambda x: torch.neg(x, out=x),
    "scatter": lambda x: x.scatter_(1, torch.zeros(B, 1, D, dtype=torch.long), 9.0),
    "index-copy": lambda x: x.index_copy_(1, torch.tensor([2]), OTHER[:, :1]),
    "masked-fill": lambda x: x.masked_fill_(OTHER > 0, -1.0),
    "clamp": lambda x: x.clamp_(-0.5, 0.5),
    "relu-inplace": lambda x: F.relu(x, inplace=True),
    "set-data": lambda x: setattr(x, "data", OTHER.clone()),
    "foreach": lambda x: torch._foreach_add_([x], 2.0),
    "lerp": lambda x: x.lerp_(OTHER, 0.5),
}
METADATA = {
    "shape": lambda x: x.shape,
    "size": lambda x: (x.size(), x.size(1)),
    "dtype": lambda x: x.dtype,
    "device": lambda x: x.device,
    "ndim": lambda x: (x.ndim, x.dim()),
    "numel": lambda x: (x.numel(), x.nelement(), torch.numel(x)),
    "len": lambda x: len(x),
    "stride": lambda x: (x.stride(), x.stride(0)),
    "contiguous": lambda x: x.is_contiguous(),
    "element-size": lambda x: x.element_size(),
    "floating": lambda x: (x.is_floating_point(), torch.is_floating_point(x)),
    "layout": lambda x: x.layout,
    "requires-grad": lambda x: x.requires_grad,
    "placement": lambda x: (x.is_cuda, x.is_cpu, x.is_meta, x.get_device()),
    "tensor": lambda x: (isinstance(x, Tensor), torch.is_tensor(x)),
    "unpacked-shape": lambda x: [*x.shape],
}


def saved_and_loaded(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["x"]


def set_in_other(x: Tensor) -> Tensor:
    other = torch.zeros(B, 2 * N, D)
    other[:, :N] = x
    other[:, N:] += x
    return other


def assert_same(found: object, expected: object) -> None:
    """Assert equal values and plain types, through tuples and lists."""
    assert not isinstance(found, Deferred)
    if isinstance(expected, Tensor):
        assert_same_bits(found, expected)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected, strict=True)
    elif isinstance(expected, (tuple, list)) and expected and isinstance(expected[0], Tensor):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READS)
def test_every_read_gives_what_it_gives_of_the_value(name: str, deferred: Deferred, expected: Tensor) -> None:
    assert_same(READS[name](deferred), READS[name](expected))


@pytest.mark.parametrize("name", READS)
def test_a_read_changes_neither_the_value_nor_the_stream(
    name: str, deferred: Deferred, expected: Tensor
) -> None:
    READS[name](deferred)
    assert_same(deferred.clone(), expected)
    assert_same(deferred.stream().value(), expected)


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_known_without_the_value(name: str, deferred: Deferred, expected: Tensor) -> None:
    assert METADATA[name](deferred) == METADATA[name](expected)
    assert deferred.value is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "wide", "swapped", "expanded"])
def test_metadata_is_that_of_the_value_for_every_dtype_and_stride(layout: str, dtype: torch.dtype) -> None:
    x, _ = laid_out(X.to(dtype), layout)
    stream = ResidualStream(x)
    stream.add(FEATURE)
    deferred = Deferred(stream)
    known = [read(deferred) for read in METADATA.values()]
    assert deferred.value is None
    assert known == [read(deferred.materialised()) for read in METADATA.values()]


def test_repr_says_what_is_pending_and_computes_nothing(deferred: Deferred) -> None:
    assert repr(deferred) == f"Deferred([{B}, {N}, {D}], torch.float32, 1 pending)"
    assert str(deferred) == repr(deferred)
    assert deferred.value is None
    deferred.sum()
    assert repr(deferred) == f"Deferred([{B}, {N}, {D}], torch.float32, materialised)"


def test_the_value_is_computed_once(deferred: Deferred, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    operator = fastcache.stream.residual_stream.residual_update
    monkeypatch.setattr(
        fastcache.stream.residual_stream,
        "residual_update",
        lambda *args, **kwargs: launches.append("update") or operator(*args, **kwargs),
    )
    for _ in range(3):
        deferred.sum()
        deferred[0]
    assert launches == ["update"] and deferred.materialised() is deferred.materialised()


def test_the_value_aliases_no_other_tensor() -> None:
    for stream in (pending(), ResidualStream(X)):
        value = Deferred(stream).materialised()
        assert value.untyped_storage().data_ptr() not in [
            tensor.untyped_storage().data_ptr() for tensor in (X, FEATURE, GATE)
        ]


def test_the_value_is_a_plain_tensor(deferred: Deferred) -> None:
    assert type(deferred.materialised()) is Tensor
    assert type(deferred + 1) is Tensor and type(deferred.detach()) is Tensor


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, torch.enable_grad],
    ids=["no_grad", "inference_mode", "enable_grad"],
)
def test_it_is_read_in_every_grad_mode(mode: Callable, expected: Tensor) -> None:
    with mode():
        assert_same(Deferred(pending())[:, 1:].clone(), expected[:, 1:])


def test_two_of_them_meet_in_one_operator(expected: Tensor) -> None:
    first, second = Deferred(pending()), Deferred(pending(OTHER))
    assert_same(torch.cat([first, second]), torch.cat([expected, pending(OTHER).value()]))
    assert_same(first + second, expected + pending(OTHER).value())


def test_a_compiled_function_takes_one(deferred: Deferred, expected: Tensor) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x: x * 2 + 1, backend="aot_eager")
    assert_same(function(deferred), expected * 2 + 1)


def test_a_hook_of_a_module_sees_the_value(deferred: Deferred, expected: Tensor) -> None:
    seen: list[Tensor] = []
    module = torch.nn.Identity()
    module.register_forward_hook(lambda _module, args, output: seen.append(output.clone()))
    module(deferred)
    assert_same(seen[0], expected)


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_seen_by_later_reads_and_by_the_next_block(
    name: str, deferred: Deferred, expected: Tensor
) -> None:
    WRITES[name](deferred)
    WRITES[name](expected)
    assert_same(deferred.clone(), expected)
    assert_same(deferred.stream().value().clone(), expected)


@pytest.mark.parametrize("name", WRITES)
def test_no_write_reaches_the_stream_it_came_from(name: str) -> None:
    x, stream = X.clone(), pending()
    stream = pending(x)
    deferred = Deferred(stream)
    WRITES[name](deferred)
    assert_same(x, X)
    assert_same(stream.value(), pending().value())


@pytest.mark.parametrize("name", WRITES)
def test_a_write_without_pending_updates_does_not_reach_x(name: str) -> None:
    x = X.clone()
    deferred, expected = Deferred(ResidualStream(x)), X.clone()
    WRITES[name](deferred)
    WRITES[name](expected)
    assert_same(x, X)
    assert_same(deferred.clone(), expected)


def test_augmented_assignment_rebinds_to_the_written_value(deferred: Deferred, expected: Tensor) -> None:
    x = deferred
    x += OTHER
    x -= 1
    x *= 2
    expected += OTHER
    expected -= 1
    expected *= 2
    assert_same(x.clone(), expected)
    assert_same(deferred.clone(), expected)


def test_a_view_that_was_taken_before_a_write_shares_it(deferred: Deferred, expected: Tensor) -> None:
    view = deferred[0]
    deferred.add_(1)
    assert_same(view, (expected + 1)[0])


def test_a_change_of_shape_in_place_is_seen_in_its_metadata(deferred: Deferred, expected: Tensor) -> None:
    deferred.unsqueeze_(0)
    assert deferred.clone().shape == (1, B, N, D)
    assert deferred.shape == (1, B, N, D)


# --- later blocks -----------------------------------------------------------------------------


def test_one_that_is_held_across_later_blocks_keeps_its_value(expected: Tensor) -> None:
    stream = pending()
    held = Deferred(stream)
    for j in range(3):
        stream.modulated()
        stream.add(random_values((B, N, D), "float32", 30 + j))
    stream.value()
    assert held.value is None
    assert_same(held.clone(), expected)


def test_several_held_ones_are_read_in_any_order() -> None:
    stream, held, expected = ResidualStream(X), [], []
    for j in range(4):
        stream.add(random_values((B, N, D), "float32", 40 + j), GATE)
        held.append(Deferred(stream))
        expected.append(Deferred(stream).materialised())
    for j in (2, 0, 3, 1):
        assert_same(held[j].clone(), expected[j])


def test_the_next_block_continues_without_the_value(deferred: Deferred, expected: Tensor) -> None:
    stream = deferred.stream()
    assert deferred.value is None and len(stream.pending) == 1
    stream.add(OTHER)
    together = ResidualStream(X)
    together.add(FEATURE, GATE)
    together.add(OTHER)
    assert_same(stream.value(), together.value())
    assert_same(deferred.clone(), expected)


def test_the_next_block_continues_from_a_value_that_was_read(deferred: Deferred, expected: Tensor) -> None:
    deferred.sum()
    stream = deferred.stream()
    assert not stream.pending
    stream.add(OTHER)
    assert_same(stream.value(), expected + OTHER)


def test_a_later_block_does_not_change_a_value_that_was_read(deferred: Deferred, expected: Tensor) -> None:
    value = deferred.materialised()
    stream = deferred.stream()
    stream.add(OTHER)
    stream.modulated()
    stream.value()
    assert_same(value, expected)


def test_a_change_of_x_before_the_first_read_is_an_error() -> None:
    x = X.clone()
    deferred = Deferred(pending(x))
    x.add_(1)
    with pytest.raises(
        RuntimeError, match="x was modified in place while updates of the residual stream were pending"
    ):
        deferred.sum()


def test_a_change_of_x_after_the_first_read_does_not_matter(expected: Tensor) -> None:
    x = X.clone()
    deferred = Deferred(pending(x))
    deferred.sum()
    x.add_(1)
    assert_same(deferred.clone(), expected)


def test_a_pending_refresh_is_stored_once_and_its_value_is_exact() -> None:
    slot, fresh = OTHER.clone(), FEATURE + 1
    stream = ResidualStream(X)
    stream.refresh(slot, fresh)
    held = Deferred(stream)
    assert_same(held.clone(), X + fresh)
    assert_same(stream.value(), X + fresh)
    assert_same(slot, fresh)


def test_a_refresh_that_is_read_after_a_later_refresh_of_its_slot_keeps_its_value() -> None:
    slot, first, second = OTHER.clone(), FEATURE + 1, FEATURE + 2
    stream = ResidualStream(X)
    stream.refresh(slot, first)
    held = Deferred(stream)
    stream.refresh(slot, second)
    assert_same(stream.value(), (X + first) + second)
    assert_same(held.clone(), X + first)
    assert_same(slot, second)
