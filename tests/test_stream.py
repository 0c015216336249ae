"""ResidualStream against the plain equations, and its promise of one launch."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, assert_same_bits, each_backend, random_values
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fastcache
import fastcache.stream.residual_stream
from fastcache import ResidualStream, use_backend
from fastcache.engine.record import OperatorCount
from fastcache.ops import Norm, residual_update, slot_map

B, N, D = 2, 6, 24
COMPILED = [backend for backend in BACKENDS if backend != "eager"]
GATES = {
    "none": (),
    "D": (D,),
    "1D": (1, D),
    "BD": (B, D),
    "B1D": (B, 1, D),
    "two-frames": (B, 2, D),
    "three-frames": (B, 3, D),
    "shared-frames": (1, 3, D),
    "BND": (B, N, D),
    "1ND": (1, N, D),
    "row": (4, B, D),  # packed, of which one row is meant
    "frames-row": (4, B, 2, D),
}


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_values(shape, str(dtype).removeprefix("torch."), seed)


def per_token(gate: Tensor) -> Tensor:
    """A gate as [B or 1, N or 1, D] in float64."""
    gate = gate.double()
    if gate.ndim < 3:
        return gate.reshape(-1, 1, D)
    return gate.repeat_interleave(N // gate.shape[1], 1)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every operator call that the stream makes, by name."""
    made: list[str] = []
    for name in ("residual_update", "residual_update_scatter_"):
        operator = getattr(fastcache.stream.residual_stream, name)

        def counted(*args, _name=name, _operator=operator, **kwargs):
            made.append(_name)
            return _operator(*args, **kwargs)

        monkeypatch.setattr(fastcache.stream.residual_stream, name, counted)
    return made


# --- values -----------------------------------------------------------------------------------


@each_backend
def test_a_block_equals_its_plain_equations(backend: str) -> None:
    x, attention, mlp = (tensor(B, N, D, seed=seed) for seed in range(3))
    shift, scale, gate, shift2, scale2, gate2 = tensor(B, 6 * D, seed=3).chunk(6, 1)
    with use_backend(backend):
        stream = ResidualStream(x)
        first = stream.modulated(shift, scale)
        stream.add(first * attention, gate)
        second = stream.modulated(shift2, scale2)
        stream.add(second * mlp, gate2)
        found = stream.value()
    y = x.double()
    expected_first = modulate(y, shift.double(), scale.double())
    y = y + gate.double()[:, None] * expected_first * attention
    expected_second = modulate(y, shift2.double(), scale2.double())
    y = y + gate2.double()[:, None] * expected_second * mlp
    for one, other in ((first, expected_first), (second, expected_second), (found, y)):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("norm", [Norm.LAYER, Norm.RMS, Norm.IDENTITY])
def test_norms_and_their_affine_part_equal_those_of_torch(norm: Norm, backend: str) -> None:
    x, weight, bias, scale = tensor(B, N, D), tensor(D, seed=1), tensor(D, seed=2), tensor(B, D, seed=3)
    affine = {"weight": weight, "bias": bias} if norm is not Norm.IDENTITY else {}
    with use_backend(backend):
        found = ResidualStream(x).modulated(None, scale, norm=norm, eps=1e-5, **affine)
    y = x.double()
    if norm is Norm.LAYER:
        y = F.layer_norm(y, (D,), weight.double(), bias.double(), 1e-5)
    if norm is Norm.RMS:
        y = F.rms_norm(y, (D,), weight.double(), 1e-5) + bias.double()
    torch.testing.assert_close(found.double(), y * (1 + scale.double()[:, None]), rtol=1e-5, atol=1e-5)


@each_backend
def test_terms_of_one_launch_are_rounded_once(backend: str) -> None:
    x = torch.full((1, 1, 8), 256.0, dtype=torch.bfloat16)
    half = torch.full((1, 1, 8), 0.75, dtype=torch.bfloat16)  # alone below half a step of 2
    with use_backend(backend):
        stream = ResidualStream(x)
        for _ in range(4):
            stream.add(half)
        assert stream.value()[0, 0, 0].item() == 260.0  # 259 rounded to even; one by one it would stay 256


@each_backend
def test_the_stream_gives_the_bits_of_the_operators(backend: str) -> None:
    x, first, second = (tensor(B, N, D, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    gates = tensor(5, B, D, seed=3, dtype=torch.bfloat16)
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.add(first, gates, gate_row=4)
        stream.add(second, weight=0.5)
        h = stream.modulated()
        expected = residual_update(
            x,
            [first, second],
            gates,
            gate_index=torch.tensor([4, -1], dtype=torch.int32),
            weights=torch.tensor([1.0, 0.5]),
            norm=Norm.LAYER,
        )
    assert_same_bits((stream.value(), h), (expected.x, expected.h))


@each_backend
@pytest.mark.parametrize(("first", "second"), list(itertools.product(GATES, repeat=2)))
def test_two_kinds_of_gates_go_together(first: str, second: str, backend: str, launches: list[str]) -> None:
    check_gates((first, second), backend)
    assert launches == ["residual_update"]


@each_backend
@pytest.mark.parametrize("weighted", [False, True])
def test_every_kind_of_gate_goes_together_in_one_launch(
    weighted: bool, backend: str, launches: list[str]
) -> None:
    kinds = [kind for kind in GATES if kind != "two-frames"]  # 2 and 3 frames together are tested above
    check_gates(tuple(kinds), backend, weighted)
    assert launches == ["residual_update"]


def check_gates(kinds: tuple[str, ...], backend: str, weighted: bool = False) -> None:
    x = tensor(B, N, D)
    expected = x.double()
    with use_backend(backend):
        stream = ResidualStream(x)
        for j, kind in enumerate(kinds):
            feature, weight = tensor(B, N, D, seed=10 + j), 0.25 * j - 1 if weighted and j % 3 else None
            gate = tensor(*GATES[kind], seed=50 + j) if kind != "none" else None
            row = 2 if "row" in kind else None
            stream.add(feature, gate, gate_row=row, weight=weight)
            coefficient = 1.0 if gate is None else per_token(gate if row is None else gate[row])
            expected = expected + (1.0 if weight is None else weight) * coefficient * feature.double()
        found = stream.value()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@each_backend
def test_one_tensor_as_a_gate_and_as_rows_of_gates(backend: str) -> None:
    x, feature, table = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(B, D, seed=2)
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.add(feature, table)  # one gate per sample
        stream.add(feature, table, gate_row=1)  # row 1 for every sample
        found = stream.value()
    torch.testing.assert_close(found, x + table[:, None] * feature + table[1] * feature, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize(
    "dtypes", list(itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2)), ids=str
)
def test_gates_of_different_dtypes_go_together(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    x, feature = tensor(B, N, D), tensor(B, N, D, seed=1)
    gates = [tensor(B, D, seed=2 + j, dtype=dtype) for j, dtype in enumerate(dtypes)]
    with use_backend(backend):
        stream = ResidualStream(x)
        for gate in gates:
            stream.add(feature, gate)
        found = stream.value()
    torch.testing.assert_close(
        found, x + sum(gate.float()[:, None] for gate in gates) * feature, rtol=1e-5, atol=1e-5
    )


@each_backend
def test_features_of_different_dtypes_go_in_one_launch_each(backend: str, launches: list[str]) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16)
    x = tensor(B, N, D)
    features = [tensor(B, N, D, seed=1 + j, dtype=dtype) for j, dtype in enumerate(dtypes)]
    with use_backend(backend):
        stream = ResidualStream(x)
        for feature in features:
            stream.add(feature)
        h = stream.modulated()
    expected = x.double() + sum(feature.double() for feature in features)
    torch.testing.assert_close(stream.value().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.double(), layer_norm(expected), rtol=1e-5, atol=1e-5)
    assert len(launches) == 3


@each_backend
@pytest.mark.parametrize(("terms", "expected"), [(1024, 1), (1025, 2), (2050, 3)])
def test_more_terms_than_one_launch_holds(
    terms: int, expected: int, backend: str, launches: list[str]
) -> None:
    x, features, gates = tensor(1, 2, 8), tensor(terms, 1, 2, 8, seed=1), tensor(terms, 1, 8, seed=2)
    with use_backend(backend):
        stream = ResidualStream(x)
        for j in range(terms):
            stream.add(features[j], gates, gate_row=j)
        found = stream.value()
    torch.testing.assert_close(
        found.double(), x.double() + (gates[:, :, None].double() * features).sum(0), rtol=1e-4, atol=1e-4
    )
    assert len(launches) == expected


# --- rows and refresh -------------------------------------------------------------------------


@each_backend
def test_rows_gives_the_selected_tokens_in_the_order_of_their_index(backend: str) -> None:
    x, feature, gate = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(B, D, seed=2)
    index = torch.tensor([[4, 0, 2], [1, -1, 5]])
    with use_backend(backend):
        stream, full = ResidualStream(x), ResidualStream(x)
        for each in (stream, full):
            each.add(feature, gate)
        rows, every = stream.modulated(gate, gate, rows=slot_map(index, N)), full.modulated(gate, gate)
    assert_same_bits(rows[0], every[0, [4, 0, 2]])
    assert_same_bits(rows[1, [0, 2]], every[1, [1, 5]])
    assert not rows[1, 1].any()
    assert_same_bits(stream.value(), full.value())


@each_backend
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_refresh_stores_rows_and_adds_the_slot_in_its_place_of_the_queue(
    after: int, before: int, backend: str, launches: list[str]
) -> None:
    x, slot, fresh = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(B, 3, D, seed=2)
    features, gates = tensor(4, B, N, D, seed=3), tensor(5, B, D, seed=4)
    index = torch.tensor([[0, 3, 5], [2, 1, 4]])
    stored = slot.clone()
    stored[torch.arange(B)[:, None], index] = fresh
    terms = [features[j] for j in range(before)] + [stored] + [features[2 + j] for j in range(after)]
    expected = x.double() + sum(gates[j, :, None].double() * term.double() for j, term in enumerate(terms))
    with use_backend(backend):
        stream = ResidualStream(x)
        for j in range(before):
            stream.add(features[j], gates, gate_row=j)
        stream.refresh(slot, fresh, slot_map(index, N), gates, gate_row=before)
        for j in range(after):
            stream.add(features[2 + j], gates, gate_row=before + 1 + j)
        h = stream.modulated()
    assert launches == ["residual_update_scatter_"]
    assert_same_bits(slot, stored)
    torch.testing.assert_close(stream.value().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double(), layer_norm(expected), rtol=1e-4, atol=1e-4)


@each_backend
def test_refresh_of_all_rows_needs_no_map_and_waits_for_the_launch(backend: str) -> None:
    x, slot, fresh = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(B, N, D, seed=2)
    before = slot.clone()
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.refresh(slot, fresh)
        assert_same_bits(slot, before)
        assert_same_bits(stream.value(), residual_update(x, [fresh]).x)
    assert_same_bits(slot, fresh)


@each_backend
def test_two_refreshes_take_two_launches_in_order(backend: str, launches: list[str]) -> None:
    x, slots, fresh = tensor(B, N, D), tensor(2, B, N, D, seed=1), tensor(2, B, N, D, seed=2)
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.refresh(slots[0], fresh[0])
        stream.refresh(slots[1], fresh[1])
        found = stream.value()
    assert launches == ["residual_update_scatter_"] * 2
    assert_same_bits(slots, fresh)
    torch.testing.assert_close(found, x + fresh[0] + fresh[1])


@each_backend
def test_refreshing_one_slot_twice_stores_the_second_and_adds_both(backend: str) -> None:
    x, slot, fresh = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(2, B, N, D, seed=2)
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.refresh(slot, fresh[0])
        stream.refresh(slot, fresh[1])
        found = stream.value()
    assert_same_bits(slot, fresh[1])
    torch.testing.assert_close(found, x + fresh[0] + fresh[1])


@each_backend
@pytest.mark.parametrize("first", ["add", "refresh"])
def test_a_slot_that_is_queued_as_a_feature_and_refreshed_keeps_the_order_of_the_queue(
    first: str, backend: str
) -> None:
    x, slot, fresh = tensor(B, N, D), tensor(B, N, D, seed=1), tensor(B, N, D, seed=2)
    old = slot.clone()
    with use_backend(backend):
        stream = ResidualStream(x)
        if first == "add":
            stream.add(slot)
        stream.refresh(slot, fresh)
        if first == "refresh":
            stream.add(slot)
        found = stream.value()
    torch.testing.assert_close(found, x + (old if first == "add" else fresh) + fresh)
    assert_same_bits(slot, fresh)


# --- one launch -------------------------------------------------------------------------------


@each_backend
def test_every_modulated_and_value_is_one_launch(backend: str, launches: list[str]) -> None:
    x, gates = tensor(B, N, D), tensor(8, B, D, seed=1)
    with use_backend(backend):
        stream = ResidualStream(x)
        for j in range(4):
            stream.modulated()
            stream.add(tensor(B, N, D, seed=j), gates, gate_row=j)
            stream.add(tensor(B, N, D, seed=j + 20), gates, gate_row=7 - j)
        stream.value()
    assert launches == ["residual_update"] * 5


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("terms", [1, 2, 7])
def test_a_launch_of_packed_gates_is_one_operator_and_nothing_else(terms: int, backend: str) -> None:
    x, gates, features = tensor(B, N, D), tensor(8, B, D, seed=1), tensor(8, B, N, D, seed=2).unbind()
    with use_backend(backend):
        for _ in range(2):  # the second time, index and weight rows are kept from the first
            stream = ResidualStream(x)
            for j in range(terms):
                stream.add(features[j], gates, gate_row=j, weight=0.5)
            with OperatorCount() as counted:
                stream.modulated(gates[0], gates[1])
    assert counted.count == 1


@each_backend
def test_a_value_with_nothing_pending_costs_nothing(backend: str, launches: list[str]) -> None:
    x = tensor(B, N, D)
    with use_backend(backend):
        stream = ResidualStream(x)
        assert stream.value() is x
        stream.add(tensor(B, N, D, seed=1))
        assert stream.value() is stream.value() and stream.value() is not x
    assert len(launches) == 1


@each_backend
def test_adding_launches_nothing(backend: str, launches: list[str]) -> None:
    stream = ResidualStream(tensor(B, N, D))
    stream.add(tensor(B, N, D, seed=1), tensor(B, D))
    assert launches == [] and len(stream.pending) == 1


# --- x ----------------------------------------------------------------------------------------


@each_backend
def test_x_is_never_modified(backend: str) -> None:
    x = tensor(B, N, D)
    before, version = x.clone(), x._version
    with use_backend(backend):
        stream = ResidualStream(x)
        for j in range(3):
            stream.add(tensor(B, N, D, seed=j), tensor(B, D))
            stream.modulated()
        stream.refresh(tensor(B, N, D), tensor(B, N, D, seed=9))
        stream.value()
    assert_same_bits(x, before)
    assert x._version == version


@each_backend
def test_what_was_returned_is_not_modified_later(backend: str) -> None:
    with use_backend(backend):
        stream = ResidualStream(tensor(B, N, D))
        stream.add(tensor(B, N, D, seed=1))
        first = stream.value()
        h = stream.modulated()
        kept = (first.clone(), h.clone())
        stream.add(tensor(B, N, D, seed=2))
        stream.modulated()
        stream.value()
    assert_same_bits((first, h), kept)


@each_backend
@pytest.mark.parametrize("launch", ["value", "modulated"])
@pytest.mark.parametrize("through", ["x", "view", "out"])
def test_a_change_of_x_while_updates_are_pending_is_an_error(through: str, launch: str, backend: str) -> None:
    x = tensor(B, N, D)
    with use_backend(backend):
        stream = ResidualStream(x)
        stream.add(tensor(B, N, D, seed=1))
        if through == "out":
            torch.neg(x, out=x)
        else:
            (x if through == "x" else x[0, :2]).add_(1)
        with pytest.raises(
            RuntimeError, match="x was modified in place while updates of the residual stream were pending"
        ):
            getattr(stream, launch)()


@each_backend
def test_a_change_of_the_intermediate_value_while_updates_are_pending_is_an_error(backend: str) -> None:
    with use_backend(backend):
        stream = ResidualStream(tensor(B, N, D))
        stream.add(tensor(B, N, D, seed=1))
        value = stream.value()
        stream.add(tensor(B, N, D, seed=2))
        value.mul_(2)
        with pytest.raises(RuntimeError, match="x was modified in place"):
            stream.value()


@each_backend
def test_updates_of_a_launch_that_failed_are_not_dropped_in_silence(backend: str) -> None:
    with use_backend(backend):
        stream = ResidualStream(tensor(B, N, D))
        stream.add(tensor(B, N, D, seed=1), torch.ones(D + 1))
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError), match="gates: expected"):
                stream.value()


@pytest.mark.parametrize("shape", [(N, D), (1, B, N, D)], ids=str)
def test_x_of_another_rank_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, N, D\], got"):
        ResidualStream(torch.zeros(shape))


@each_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_it_runs_where_no_gradient_is_wanted(mode: Callable, backend: str) -> None:
    with mode(), use_backend(backend):
        x, feature = tensor(B, N, D), tensor(B, N, D, seed=1)
        stream = ResidualStream(x)
        stream.add(feature, weight=2.0)
        torch.testing.assert_close(stream.value(), x + 2 * feature)


@each_backend
def test_rows_of_constants_made_in_inference_mode_serve_outside_it(backend: str) -> None:
    x, gates = tensor(B, N, D), tensor(3, B, D)
    with use_backend(backend):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                stream = ResidualStream(x)
                stream.add(tensor(B, N, D, seed=1), gates, gate_row=1, weight=0.123)
                stream.add(tensor(B, N, D, seed=2), gates, gate_row=2)
                found = stream.value()
    assert not found.requires_grad


# --- torch.compile ----------------------------------------------------------------------------


class Block(nn.Module):
    """A small adaLN-Zero block written with the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.mix, self.mlp = (
            nn.Linear(D, 6 * D),
            nn.Linear(D, D),
            nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition).chunk(6, 1)
        stream = ResidualStream(x)
        stream.add(self.mix(stream.modulated(shift, scale)), gate)
        stream.add(self.mlp(stream.modulated(shift2, scale2)), gate2)
        return stream.value()


class Model(nn.Module):
    """Two blocks, a stored feature with packed gates and weights, and a refresh of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, condition: Tensor, slot: Tensor, fresh: Tensor, gates: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        stream = ResidualStream(x)
        stream.add(x.sin(), gates, gate_row=2)
        stream.add(x.cos(), gates, gate_row=0, weight=0.5)
        stream.refresh(slot, fresh)
        return stream.modulated(condition, condition) + stream.value()


def plain_model(
    model: Model, x: Tensor, condition: Tensor, slot: Tensor, fresh: Tensor, gates: Tensor
) -> Tensor:
    for block in model.blocks:
        shift, scale, gate, shift2, scale2, gate2 = (
            part[:, None] for part in block.modulation(condition).chunk(6, 1)
        )
        x = x + gate * block.mix(layer_norm(x) * (1 + scale) + shift)
        x = x + gate2 * block.mlp(layer_norm(x) * (1 + scale2) + shift2)
    x = x + gates[2, :, None] * x.sin() + 0.5 * gates[0, :, None] * x.cos() + fresh
    return modulate(x, condition, condition) + x


def model_arguments(batch: int, tokens: int = N) -> tuple[Tensor, ...]:
    return (
        tensor(batch, tokens, D, seed=batch),
        tensor(batch, D, seed=1),
        tensor(batch, tokens, D, seed=2),
        tensor(batch, tokens, D, seed=3),
        tensor(3, batch, D, seed=4),
    )


@pytest.fixture
def model() -> Model:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


@each_backend
def test_the_model_below_equals_its_plain_equations(model: Model, backend: str) -> None:
    arguments = model_arguments(2)
    with use_backend(backend):
        torch.testing.assert_close(model(*arguments), plain_model(model, *arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_a_model_with_residual_streams_is_one_graph_with_equal_values(compiler: str, model: Model) -> None:
    arguments, compiled = model_arguments(2), model_arguments(2)
    found = torch.compile(model, fullgraph=True, backend=compiler)(*compiled)
    torch.testing.assert_close(found, plain_model(model, *arguments), rtol=1e-4, atol=1e-4)
    assert_same_bits(compiled[2], arguments[3])


def test_a_model_with_residual_streams_compiles_once_for_all_batch_sizes(model: Model) -> None:
    counter = CompileCounter()
    function = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens in ((2, 6), (3, 6), (5, 12), (4, 30), (7, 9)):
        arguments = model_arguments(batch, tokens)
        torch.testing.assert_close(function(*arguments), plain_model(model, *arguments), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_rows_trace_with_their_map_as_an_argument() -> None:
    torch._dynamo.reset()

    def rows(x: Tensor, feature: Tensor, slots: fastcache.ops.SlotMap) -> Tensor:
        stream = ResidualStream(x)
        stream.add(feature, weight=0.5)
        return stream.modulated(rows=slots)

    x, feature, slots = tensor(B, N, D), tensor(B, N, D, seed=1), slot_map(torch.tensor([[1, 3], [5, 0]]), N)
    assert_same_bits(
        torch.compile(rows, fullgraph=True, backend="aot_eager")(x, feature, slots), rows(x, feature, slots)
    )
