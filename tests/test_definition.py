"""The definition itself (backends/eager.py): its float64 results against equations written token by token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT8, VECTOR_SHAPES, Call, Form, build, each_form
from torch import Tensor

from fastcache.ops import Norm

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def row_of(vector: Tensor, b: int, n: int, tokens: int) -> Tensor:
    """The row of a vector that serves token n of sample b, in float64."""
    vector = vector.double()
    if vector.ndim == 1:
        return vector
    sample = vector[b if len(vector) > 1 else 0]
    return sample if vector.ndim == 2 else sample[n // (tokens // len(sample))]


def stored_rows(call: Call) -> tuple[Tensor, Tensor | None]:
    """The slot and its row scales after it took its fresh rows, row by row."""
    a = call.arguments
    slot, slot_scale = a["slot"].clone(), None if a["slot_scale"] is None else a["slot_scale"].clone()
    for b in range(slot.shape[0]):
        for n in range(slot.shape[1]):
            k = n if a["fresh_slots"] is None else int(a["fresh_slots"][b, n])
            if k < 0:
                continue
            row = a["fresh"][b, k]
            if slot_scale is not None:
                row = row.float()
                slot_scale[b, n] = row.abs().max() / 448
                row = row / slot_scale[b, n]
            slot[b, n] = row.to(slot.dtype)
    return slot, slot_scale


def coefficient(call: Call, j: int, b: int, n: int) -> Tensor | float:
    """weight * gate of term j for one token."""
    a = call.arguments
    gate: Tensor | float = 1.0
    if a["gate_index"] is not None:
        index = int(a["gate_index"][j])
        gate = 1.0 if index < 0 else row_of(a["gates"][index], b, n, call.form.tokens)
    elif a["gates"] is not None:
        gate = row_of(a["gates"], b, n, call.form.tokens)
    return gate if a["weights"] is None else float(a["weights"][j]) * gate


def expected(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(x', h, errors) in float64."""
    a, form = call.arguments, call.form
    terms = [
        (feature.double(), None if a["scales"] is None else j) for j, feature in enumerate(a["features"])
    ]
    if form.slot:
        position = form.terms if form.position < 0 else form.position
        terms = [
            (feature, None if number is None else number + (number >= position)) for feature, number in terms
        ]
        slot, slot_scale = stored_rows(call)
        terms.insert(
            position,
            (slot.double() if slot_scale is None else slot.double() * slot_scale.double()[..., None], None),
        )
        newest = position
    else:
        newest = len(terms) - 1
    scaled = [
        feature if number is None else feature * a["scales"][number].double()[..., None]
        for feature, number in terms
    ]
    x = a["x"].double().clone()
    for b in range(form.batch):
        for n in range(form.tokens):
            for j, feature in enumerate(scaled):
                x[b, n] += coefficient(call, j, b, n) * feature[b, n]
    return (
        x,
        expected_h(call, x) if form.norm else None,
        expected_errors(scaled[newest], a["reference"].double()) if form.reference else None,
    )


def expected_h(call: Call, x: Tensor) -> Tensor:
    """h of every token, or of the tokens with a slot in their packed rows."""
    a, (B, N, D) = call.arguments, x.shape
    h = torch.zeros(B, N if a["row_slots"] is None else a["row_count"], D, dtype=torch.float64)
    weight, bias = (None if a[name] is None else a[name].double() for name in ("norm_weight", "norm_bias"))
    for b in range(B):
        for n in range(N):
            k = n if a["row_slots"] is None else int(a["row_slots"][b, n])
            if k < 0:
                continue
            row = x[b, n]
            if a["norm"] == Norm.LAYER:
                row = F.layer_norm(row, (D,), weight, bias, a["eps"])
            if a["norm"] == Norm.RMS:
                row = F.rms_norm(row, (D,), weight, a["eps"]) + (0 if bias is None else bias)
            scale = 0 if a["scale"] is None else row_of(a["scale"], b, n, N)
            shift = 0 if a["shift"] is None else row_of(a["shift"], b, n, N)
            h[b, k] = row * (1 + scale) + shift
    return h


def expected_errors(feature: Tensor, reference: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([(f - r).abs().sum(), f.abs().sum(), r.abs().sum()])
            for f, r in zip(feature, reference, strict=True)
        ]
    )


def assert_defined(form: Form) -> None:
    call = build(replace(form, x="float64"))
    updated, h, errors = expected(call)
    stored = stored_rows(call) if form.slot else (None, None)
    found = call.run("eager")
    for one, other in ((found.x, updated if form.need_x else None), (found.h, h)):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **EXACT)
    if errors is not None:
        torch.testing.assert_close(found.errors, errors.float())
    for name, tensor in zip(("slot", "slot_scale"), stored, strict=False):
        if tensor is not None:
            assert torch.equal(call.arguments[name].view(torch.uint8), tensor.view(torch.uint8)), name


@each_form
@pytest.mark.parametrize("seed", range(3))
def test_every_form_equals_its_equations(form: Form, seed: int) -> None:
    assert_defined(replace(form, seed=seed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
def test_vectors_of_every_shape_equal_their_equations(shape: str, packed: bool) -> None:
    assert_defined(
        Form(terms=4, gate=shape, packed=packed, norm=Norm.LAYER, shift=shape, scale=shape, vector="bfloat16")
    )


@pytest.mark.parametrize("norm", [Norm.LAYER, Norm.RMS])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2, 1.0])
def test_eps_is_that_of_torch(eps: float, norm: Norm) -> None:
    assert_defined(Form(norm=norm, affine=True, eps=eps))


@pytest.mark.parametrize("position", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("slot", ["float32", FLOAT8])
def test_the_slot_in_every_position_equals_its_equations(slot: str, position: int) -> None:
    assert_defined(
        Form(
            terms=3,
            slot=slot,
            fresh_rows=4,
            position=position,
            gate="BFD",
            packed=True,
            weights=True,
            scales=True,
            reference=True,
        )
    )
