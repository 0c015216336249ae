"""residual_update: values against float64, strides, sizes, special values, equalities, refusals."""

import re
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import (
    BACKENDS,
    PRECISIONS,
    REFUSED,
    UPDATES,
    VECTOR_SHAPES,
    Call,
    Form,
    Precision,
    assert_outputs,
    assert_same_bits,
    build,
    each_backend,
    each_dtype,
    each_layout,
    each_precision,
    each_update,
    exact_modulated,
    exact_update,
    laid_out,
    random_values,
    verify,
)

import fastcache
from fastcache.ops import Norm, residual_update

EVERYTHING = UPDATES["all"]
MODULATED = UPDATES["modulated"]
WIDTHS = (
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    64,
    65,
    111,
    769,
    1152,
    1160,
    1279,
    1280,
    1281,
    1536,
    2561,
    3072,
    5125,
    8192,
)
SPECIAL_WIDTH = 37  # whole vectors and a tail on every instruction set
PLACES = (0, 15, 16, 36)  # first channel, both sides of a vector's end, last channel of the tail


def of_dtype(form: Form, dtype: torch.dtype) -> Form:
    """The form with one dtype everywhere."""
    name = str(dtype).removeprefix("torch.")
    return replace(form, x=name, feature=name, vector=name, fresh=name, slot=form.slot and name)


def copied(call: Call) -> Call:
    """The same values in contiguous memory."""
    arguments = {
        name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return Call(
        call.form,
        arguments
        | {
            "features": [
                feature.clone(memory_format=torch.contiguous_format) for feature in call.arguments["features"]
            ]
        },
    )


# --- values -----------------------------------------------------------------------------------


@each_backend
@each_precision
@each_update
def test_values_lie_within_the_rounding_bounds(form: Form, precision: Precision, backend: str) -> None:
    verify(form.of(precision), backend)


@each_backend
@each_precision
@pytest.mark.parametrize(
    "form",
    [
        Form(terms=8, gate="BD", packed=True),
        Form(terms=2, gate="BD", norm=Norm.LAYER, shift="BD", scale="BD"),
    ],
    ids=["sum", "modulated"],
)
def test_the_error_is_at_most_a_tenth_above_that_of_the_definition(
    form: Form, precision: Precision, backend: str
) -> None:
    call = build(replace(form.of(precision), batch=2, tokens=48, channels=1152))
    exact, _ = exact_update(call)
    wanted = {"x": exact, "h": exact_modulated(call, exact) if form.norm else None}
    found, defined = call.run(backend), call.run("eager")
    for name, values in wanted.items():
        if values is not None:
            error, defined_error = (
                (getattr(result, name).double() - values).square().mean().sqrt()
                for result in (found, defined)
            )
            assert values.numel() >= 1e5 and defined_error > 0
            assert error <= 1.1 * defined_error


@each_backend
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
@pytest.mark.parametrize("role", ["gate", "shift", "scale"])
@pytest.mark.parametrize(
    "precision", [PRECISIONS["bf16"], PRECISIONS["fp32-vectors"]], ids=["bf16", "fp32-vectors"]
)
def test_gates_shifts_and_scales_of_every_shape(
    precision: Precision, role: str, shape: str, backend: str
) -> None:
    verify(replace(Form(terms=2, norm=Norm.LAYER), **{role: shape}).of(precision), backend)


@each_backend
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
def test_packed_gates_of_every_shape(shape: str, backend: str) -> None:
    verify(Form(terms=6, gate=shape, packed=True, norm=Norm.RMS), backend)


@each_backend
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6, 12])
def test_any_number_of_frames_that_divides_the_tokens(frames: int, backend: str) -> None:
    call = build(Form(tokens=12, gate="BND", norm=Norm.LAYER, scale="BND"))
    gates, scale = (random_values((2, frames, 24), "float32", seed) for seed in (1, 2))
    per_token = call.given(
        gates=gates.repeat_interleave(12 // frames, 1), scale=scale.repeat_interleave(12 // frames, 1)
    )
    framed = call.given(gates=gates, scale=scale)
    found = framed.run(backend)
    assert_same_bits(found, per_token.run(backend))
    assert_outputs(framed, found, found.x)


@each_backend
def test_chunks_of_an_adaln_output_are_taken_as_they_are(backend: str) -> None:
    batch, tokens, channels = 3, 5, 40
    modulation = random_values((batch, 6 * channels), "bfloat16", 1)
    shift, scale, gate, _, _, _packed = modulation.chunk(6, 1)
    assert shift.stride() == gate.stride() == (6 * channels, 1)
    x, feature = (random_values((batch, tokens, channels), "bfloat16", seed) for seed in (2, 3))
    with fastcache.use_backend(backend):
        found = residual_update(x, [feature], gate, norm=Norm.LAYER, shift=shift, scale=scale)
        expected = residual_update(
            x,
            [feature],
            gate.contiguous(),
            norm=Norm.LAYER,
            shift=shift.contiguous(),
            scale=scale.contiguous(),
        )
    assert_same_bits(found, expected)


@each_backend
@each_layout
@each_update
def test_strides_do_not_change_a_bit(form: Form, layout: str, backend: str) -> None:
    call = build(replace(form, channels=27, layout=layout, vector_layout="chunk", offset=1))
    assert_same_bits(call.run(backend), copied(call).run(backend))


@each_backend
@each_layout
def test_strided_values_lie_within_the_rounding_bounds(layout: str, backend: str) -> None:
    verify(replace(EVERYTHING, channels=27, layout=layout, vector_layout="wide"), backend)


@each_backend
@each_layout
def test_outputs_are_contiguous_whatever_the_strides_of_the_inputs(layout: str, backend: str) -> None:
    result = build(replace(EVERYTHING, layout=layout, rows=None)).run(backend)
    assert all(output.is_contiguous() for output in result)


@each_backend
@each_dtype
def test_misaligned_views_are_read_and_only_read(dtype: torch.dtype, backend: str) -> None:
    form = of_dtype(replace(EVERYTHING, channels=111, tokens=3, terms=3), dtype)
    for offset in range(41):
        verify(replace(form, offset=offset), backend)


# --- sizes ------------------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize("channels", WIDTHS)
def test_any_number_of_channels(channels: int, dtype: torch.dtype, backend: str) -> None:
    verify(
        of_dtype(replace(EVERYTHING, batch=1, tokens=5, rows=3, terms=3, channels=channels), dtype), backend
    )


@each_backend
@each_precision
@pytest.mark.parametrize("channels", [9, 1281, 2561])
@pytest.mark.parametrize(
    "form",
    [Form(terms=1), Form(terms=2, gate="BFD"), Form(terms=3, gate="BD", packed=True, norm=Norm.LAYER)],
    ids=["one-term", "per-frame", "packed"],
)
def test_wide_rows_of_mixed_dtypes(form: Form, channels: int, precision: Precision, backend: str) -> None:
    verify(replace(form, channels=channels, batch=1, tokens=6).of(precision), backend)


@each_backend
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_any_batch_and_any_number_of_tokens(batch: int, tokens: int, backend: str) -> None:
    verify(replace(EVERYTHING, batch=batch, tokens=tokens, gate="BFD", rows=min(tokens, 3)), backend)


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
@each_update
def test_empty_inputs_give_empty_outputs(form: Form, shape: tuple[int, ...], backend: str) -> None:
    batch, tokens, channels = shape
    result = build(replace(form, batch=batch, tokens=tokens, channels=channels)).run(backend)
    if form.need_x:
        assert result.x.shape == shape
    if form.norm:
        assert result.h.shape == (batch, tokens if form.rows is None else form.rows, channels)
        assert form.rows is None or not result.h.any()
    if form.reference:
        assert result.errors.shape == (batch, 3) and not result.errors.any()


@each_backend
@each_dtype
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 7, 56, 1024])
def test_any_number_of_terms_up_to_1024(terms: int, dtype: torch.dtype, backend: str) -> None:
    packed = replace(
        EVERYTHING, terms=terms, reference=terms > 0, batch=1, tokens=3, channels=11, scales=False
    )
    verify(of_dtype(packed, dtype), backend)
    verify(of_dtype(Form(terms=terms, tokens=5, channels=19), dtype), backend)


@each_backend
def test_more_than_1024_terms_are_refused(backend: str) -> None:
    with pytest.raises(REFUSED, match="features: at most 1024 terms in one call, got 1025"):
        build(Form(terms=1025, batch=1, tokens=1, channels=1)).run(backend)


@each_backend
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 9])
def test_any_number_of_packed_rows(rows: int, need_x: bool, backend: str) -> None:
    verify(replace(UPDATES["packed-rows"], rows=rows, need_x=need_x), backend)


@each_backend
def test_packed_rows_of_no_token_are_zero(backend: str) -> None:
    call = build(replace(UPDATES["packed-rows"], rows=4)).given(
        row_slots=torch.tensor([[-1, 2, -1, -1, 0, -1], [-1] * 6], dtype=torch.int32)
    )
    h = call.run(backend).h
    assert not h[0, [1, 3]].any() and not h[1].any()
    assert h[0, [0, 2]].all()


@each_backend
def test_of_two_tokens_with_one_packed_row_one_is_taken_whole(backend: str) -> None:
    call = build(UPDATES["packed-rows"])
    every = call.given(row_slots=None).run(backend).h
    h = call.given(row_slots=torch.tensor([[0, -1, 0, 1, -1, -1]] * 2, dtype=torch.int32)).run(backend).h
    for b in range(2):
        assert torch.equal(h[b, 0], every[b, 0]) or torch.equal(h[b, 0], every[b, 2])
        assert torch.equal(h[b, 1], every[b, 3])


# --- special values ---------------------------------------------------------------------------


def special_call(dtype: torch.dtype, **changes: object) -> Call:
    """A modulated call of three gated terms, wide enough for whole vectors and a tail."""
    return build(
        of_dtype(
            replace(
                Form(
                    terms=3,
                    gate="BD",
                    norm=Norm.LAYER,
                    shift="BD",
                    scale="BD",
                    tokens=7,
                    channels=SPECIAL_WIDTH,
                ),
                **changes,
            ),
            dtype,
        )
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", PLACES)
@pytest.mark.parametrize("name", ["x", "features[0]", "features[2]"])
def test_a_special_value_stays_in_its_element_of_the_sum_and_in_its_row_of_h(
    name: str, channel: int, value: float, dtype: torch.dtype, backend: str
) -> None:
    call = special_call(dtype)
    clean = call.run(backend)
    call.tensors()[name][1, 3, channel] = value
    found = call.run(backend)
    assert not bool(torch.isfinite(found.x[1, 3, channel]))
    assert not bool(torch.isfinite(found.h[1, 3]).any())
    for output, expected in ((found.x, clean.x), (found.h, clean.h)):
        output[1, 3, channel if output is found.x else slice(None)] = expected[
            1, 3, channel if output is found.x else slice(None)
        ]
        assert_same_bits(output, expected)


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_special_value_is_not_lost_without_a_norm(value: float, backend: str) -> None:
    call = special_call(torch.float32, norm=Norm.IDENTITY)
    call.arguments["x"][0, 0, 36] = value
    found = call.run(backend)
    assert_same_bits(torch.isfinite(found.h).logical_not().nonzero(), torch.tensor([[0, 0, 36]]))


@each_backend
def test_infinities_of_both_signs_give_nan_in_their_element(backend: str) -> None:
    call = build(Form(terms=1, channels=SPECIAL_WIDTH))
    call.arguments["x"][0, 2, 5], call.arguments["features"][0][0, 2, 5] = float("inf"), float("-inf")
    assert torch.isnan(call.run(backend).x).nonzero().tolist() == [[0, 2, 5]]


@each_backend
@pytest.mark.parametrize("channel", PLACES)
def test_nan_in_a_gate_reaches_its_sample_and_channel_only(channel: int, backend: str) -> None:
    call = special_call(torch.bfloat16, norm=Norm.NONE, shift="", scale="")
    call.arguments["gates"][1, channel] = float("nan")
    wrong = torch.isnan(call.run(backend).x)
    assert bool(wrong[1, :, channel].all()) and int(wrong.sum()) == 7


@each_backend
@pytest.mark.parametrize("channel", PLACES)
@pytest.mark.parametrize("name", ["shift", "scale"])
def test_nan_in_a_modulation_reaches_its_sample_and_channel_only(
    name: str, channel: int, backend: str
) -> None:
    call = special_call(torch.bfloat16)
    call.arguments[name][1, channel] = float("nan")
    result = call.run(backend)
    wrong = torch.isnan(result.h)
    assert bool(wrong[1, :, channel].all()) and int(wrong.sum()) == 7
    assert not bool(torch.isnan(result.x).any())


@each_backend
def test_nan_in_gate_rows_that_no_term_names_is_not_read(backend: str) -> None:
    call = build(replace(UPDATES["packed-gates"], terms=2))
    call = call.given(gate_index=torch.tensor([-1, 1], dtype=torch.int32))
    call.arguments["gates"][[0, 2]] = float("nan")
    assert bool(torch.isfinite(call.run(backend).x).all())


@each_backend
@pytest.mark.parametrize("need_x", [True, False])
def test_nan_in_a_token_that_is_not_selected_does_not_reach_the_packed_rows(
    need_x: bool, backend: str
) -> None:
    call = build(replace(UPDATES["packed-rows"], need_x=need_x, rows=2))
    call = call.given(row_slots=torch.tensor([[0, -1, -1, -1, 1, -1]] * 2, dtype=torch.int32))
    call.arguments["x"][:, 2] = float("nan")
    assert bool(torch.isfinite(call.run(backend).h).all())


@each_backend
@each_dtype
def test_sums_beyond_the_largest_number_round_to_infinity_and_not_before(
    dtype: torch.dtype, backend: str
) -> None:
    top = torch.finfo(dtype).max
    half_step = top * unit_of(dtype)  # just under half of the last step
    x = torch.tensor([[[top, top, -top, top]]], dtype=dtype)
    feature = torch.tensor([[[top, 0.0, -top, half_step / 2]]], dtype=torch.float32)
    with fastcache.use_backend(backend):
        found = residual_update(x, [feature]).x
    assert found.tolist() == [[[float("inf"), top, float("-inf"), top]]]


def unit_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@each_backend
@each_dtype
def test_without_terms_every_bit_of_x_is_kept(dtype: torch.dtype, backend: str) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[: 2**16 // 8 * 8].reshape(1, 8, -1)
    x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
    with fastcache.use_backend(backend):
        assert_same_bits(residual_update(x, []).x, x)
        assert_same_bits(residual_update(x, [], norm=Norm.IDENTITY).h, x)


@each_backend
@each_dtype
def test_negative_zero_is_kept_and_only_opposite_zeros_give_positive_zero(
    dtype: torch.dtype, backend: str
) -> None:
    x = torch.tensor([[[-0.0, -0.0, 0.0, 0.0]]], dtype=dtype)
    feature = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]], dtype=dtype)
    with fastcache.use_backend(backend):
        assert torch.signbit(residual_update(x, [feature]).x).tolist() == [[[True, False, False, False]]]


@each_backend
@each_dtype
def test_subnormal_numbers_are_not_flushed_to_zero(dtype: torch.dtype, backend: str) -> None:
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    x = torch.full((1, 2, SPECIAL_WIDTH), least, dtype=dtype)
    with fastcache.use_backend(backend):
        assert_same_bits(residual_update(x, [x, x]).x, torch.full_like(x, 3 * least))
        assert_same_bits(residual_update(x, [], norm=Norm.IDENTITY).h, x)


@each_backend
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_rounding_is_to_nearest_even_for_any_pattern_of_bits(target: torch.dtype, backend: str) -> None:
    patterns = torch.randint(
        -(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    )
    ties = torch.arange(-(2**15), 2**15) * 2**16 + 2**15  # half-way between neighbours in bfloat16
    values = (
        torch.cat([patterns, ties, ties + 1, ties - 1, torch.arange(0x38000000, 0x38000000 + 2**27, 2**12)])
        .to(torch.int32)
        .view(torch.float32)
    )
    feature = values[: values.numel() // 64 * 64].reshape(1, -1, 64)
    with fastcache.use_backend(backend):
        found = residual_update(
            torch.full(feature.shape, -0.0, dtype=target), [feature]
        ).x  # -0 + f = f for every f
    expected = feature.to(target)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert_same_bits(found[~torch.isnan(found)], expected[~torch.isnan(found)])


@each_backend
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=["fp16", "bf16", "fp8"]
)
def test_every_narrow_number_is_widened_exactly(dtype: torch.dtype, backend: str) -> None:
    bits = (
        torch.arange(2**16).to(torch.uint16)
        if dtype.itemsize == 2
        else torch.arange(2**8).to(torch.uint8).repeat(3)
    )
    feature = bits.view(dtype).reshape(1, -1, 16)
    with fastcache.use_backend(backend):
        found = residual_update(torch.full(feature.shape, -0.0), [feature]).x
    expected = feature.to(torch.float32)
    assert torch.equal(torch.isnan(found), torch.isnan(expected))
    assert_same_bits(found[~torch.isnan(found)], expected[~torch.isnan(found)])


@each_backend
@each_dtype
@pytest.mark.parametrize("offset", [0.0, 50.0, 1000.0])
@pytest.mark.parametrize("channels", [111, 1152])
def test_a_large_mean_does_not_spoil_the_variance(
    channels: int, offset: float, dtype: torch.dtype, backend: str
) -> None:
    form = of_dtype(replace(MODULATED, channels=channels, terms=0), dtype)
    verify(form, backend, lambda call: call.arguments["x"].add_(offset))


@each_backend
@each_dtype
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1000.0, -3e4])
def test_rows_without_variance_give_the_shift(constant: float, dtype: torch.dtype, backend: str) -> None:
    form = of_dtype(replace(MODULATED, channels=64, terms=0), dtype)
    result = verify(form, backend, lambda call: call.arguments["x"].fill_(constant))
    assert bool(torch.isfinite(result.h).all())
    if constant in (0.0, 1.0):
        assert_same_bits(result.h, build(form).arguments["shift"][:, None].expand_as(result.h))


@each_backend
@each_dtype
@pytest.mark.parametrize("norm", [Norm.LAYER, Norm.RMS])
def test_one_spike_in_a_row_of_zeros(norm: Norm, dtype: torch.dtype, backend: str) -> None:
    def spike(call: Call) -> None:
        call.arguments["x"].zero_()[..., 17] = 1e4

    verify(of_dtype(replace(MODULATED, channels=1152, terms=0, norm=norm), dtype), backend, spike)


@each_backend
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("norm", [Norm.LAYER, Norm.RMS])
def test_eps_is_added_to_the_mean_of_squares(norm: Norm, eps: float, backend: str) -> None:
    verify(replace(MODULATED, norm=norm, eps=eps), backend, lambda call: call.arguments["x"].mul_(1e-3))


# --- equalities within a backend --------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("terms", [2, 3, 8])
def test_one_call_with_many_terms_equals_many_calls_with_one(terms: int, backend: str) -> None:
    call = build(Form(terms=terms, gate="BFD", channels=29))  # float32: the rounding between calls is exact
    x = call.arguments["x"]
    for feature in call.arguments["features"]:
        x = call.given(x=x, features=[feature]).run(backend).x
    assert_same_bits(call.run(backend).x, x)


@each_backend
@each_precision
@pytest.mark.parametrize(
    "form",
    [
        UPDATES["modulated"],
        UPDATES["affine"],
        UPDATES["rms"],
        UPDATES["identity"],
        UPDATES["packed-rows"],
        UPDATES["all"],
    ],
    ids=["modulated", "affine", "rms", "identity", "packed-rows", "all"],
)
def test_update_and_modulation_in_one_call_equal_two_calls(
    form: Form, precision: Precision, backend: str
) -> None:
    call = build(replace(form.of(precision), channels=53))
    fused = call.run(backend)
    alone = (
        call.given(x=fused.x, features=[], reference=None)
        .without("gates", "gate_index", "weights", "scales")
        .run(backend)
    )
    assert_same_bits(alone.h, fused.h)


@each_backend
@each_precision
def test_leaving_out_x_changes_neither_h_nor_errors(precision: Precision, backend: str) -> None:
    for form in (EVERYTHING, replace(EVERYTHING, rows=None), UPDATES["identity-bare"]):
        call = build(form.of(precision))
        kept, left_out = call.run(backend), call.given(need_x=False).run(backend)
        assert left_out.x is None
        assert_same_bits(left_out[1:], kept[1:])


@each_backend
@each_precision
@pytest.mark.parametrize("need_x", [True, False])
def test_packed_rows_are_the_rows_of_the_full_output(
    need_x: bool, precision: Precision, backend: str
) -> None:
    call = build(replace(EVERYTHING, channels=45, need_x=need_x).of(precision))
    every, packed = call.given(row_slots=None, row_count=0).run(backend).h, call.run(backend).h
    slots = call.arguments["row_slots"]
    for b, n in (slots >= 0).nonzero().tolist():
        assert_same_bits(packed[b, slots[b, n]], every[b, n])


@each_backend
def test_renumbering_the_slots_renumbers_the_packed_rows(backend: str) -> None:
    call = build(replace(UPDATES["packed-rows"], rows=6))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    slots = call.arguments["row_slots"]
    renumbered = torch.where(slots >= 0, order[slots.clamp(min=0).long()].int(), slots)
    assert_same_bits(call.given(row_slots=renumbered).run(backend).h[:, order], call.run(backend).h)


@each_backend
@each_precision
def test_a_token_does_not_depend_on_its_neighbours(precision: Precision, backend: str) -> None:
    call = build(replace(UPDATES["modulated"], terms=3, tokens=19, channels=45).of(precision))
    whole = call.run(backend)
    for n in (0, 3, 7, 18):
        part = call.given(
            x=call.arguments["x"][:, n : n + 1],
            features=[feature[:, n : n + 1] for feature in call.arguments["features"]],
        ).run(backend)
        assert_same_bits((part.x, part.h), (whole.x[:, n : n + 1], whole.h[:, n : n + 1]))


@each_backend
@each_precision
@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neutral_gates_weights_and_scales_change_nothing(
    terms: int, precision: Precision, backend: str
) -> None:
    call = build(replace(Form(terms=terms, channels=29).of(precision)))
    plain = call.run(backend)
    ones = torch.ones(24 + 5, dtype=getattr(torch, precision.vector))
    neutral = {
        "gates": {"gates": ones},
        "gate_index": {
            "gates": torch.full((1, 29), float("nan")),
            "gate_index": torch.full((terms,), -1, dtype=torch.int32),
        },
        "weights": {"weights": torch.ones(terms)},
        "scales": {"scales": torch.ones(terms, 2, 6)},
    }
    for arguments in neutral.values():
        assert_same_bits(call.given(**arguments).run(backend), plain)


@each_backend
@each_precision
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
def test_a_shared_vector_equals_its_copies(shape: str, precision: Precision, backend: str) -> None:
    call = build(
        Form(terms=3, gate=shape, norm=Norm.LAYER, shift=shape, scale=shape, channels=29).of(precision)
    )
    B, N, D = call.arguments["x"].shape
    spread = {
        name: per_token(call.arguments[name], N).expand(B, N, D).contiguous()
        for name in ("gates", "shift", "scale")
    }
    assert_same_bits(call.given(**spread).run(backend), call.run(backend))


def per_token(vector: torch.Tensor, tokens: int) -> torch.Tensor:
    """A vector as [B or 1, N or 1, D]."""
    if vector.ndim < 3:
        return vector.reshape(-1, 1, vector.shape[-1])
    return vector.repeat_interleave(tokens // vector.shape[1], 1)


@each_backend
def test_packed_gates_equal_the_same_gates_one_call_at_a_time(backend: str) -> None:
    call = build(replace(UPDATES["packed-gates"], terms=6, channels=29))
    x = call.arguments["x"]
    for row, feature in zip(call.arguments["gate_index"].tolist(), call.arguments["features"], strict=True):
        x = (
            call.given(
                x=x,
                features=[feature],
                gate_index=None,
                gates=None if row < 0 else call.arguments["gates"][row],
            )
            .run(backend)
            .x
        )
    assert_same_bits(call.run(backend).x, x)


@each_backend
@each_dtype
def test_doubling_everything_that_is_added_doubles_the_sum(dtype: torch.dtype, backend: str) -> None:
    call = build(of_dtype(Form(terms=4, gate="BD", channels=29), dtype))
    doubled = call.given(
        x=call.arguments["x"] * 2, features=[feature * 2 for feature in call.arguments["features"]]
    )
    assert_same_bits(doubled.run(backend).x, call.run(backend).x * 2)


@each_backend
def test_one_feature_may_be_given_without_a_list_and_any_sequence_is_one(backend: str) -> None:
    call = build(Form())
    feature = call.arguments["features"][0]
    expected = call.run(backend)
    for features in (feature, (feature,)):
        assert_same_bits(call.given(features=features).run(backend), expected)


@each_backend
def test_what_was_not_asked_for_is_none(backend: str) -> None:
    assert build(Form(need_x=False)).run(backend) == (None, None, None)


# --- repeatability ----------------------------------------------------------------------------


@each_backend
@each_dtype
def test_twenty_runs_on_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    call = build(of_dtype(replace(EVERYTHING, tokens=32, channels=769, terms=3, rows=20), dtype))
    before = torch.get_num_threads()
    try:
        expected = call.run(backend)
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            assert_same_bits(call.run(backend), expected)
    finally:
        torch.set_num_threads(before)


@each_backend
def test_concurrent_calls_do_not_disturb_each_other(backend: str) -> None:
    calls = [build(replace(EVERYTHING, seed=seed, tokens=16, channels=200)) for seed in range(4)]
    expected = [call.run(backend) for call in calls]
    failures: list[BaseException] = []

    def repeat(k: int) -> None:
        try:
            for _ in range(10):
                assert_same_bits(calls[k].run(backend), expected[k])
        except BaseException as failure:  # reported by the main thread
            failures.append(failure)

    threads = [threading.Thread(target=repeat, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# --- memory -----------------------------------------------------------------------------------


@each_backend
@each_update
def test_outputs_share_memory_with_nothing(form: Form, backend: str) -> None:
    call = build(form)
    result = [output for output in call.run(backend) if output is not None]
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*result, *call.tensors().values())]
    assert all(memory.count(output.untyped_storage().data_ptr()) == 1 for output in result)


@each_update
def test_outputs_of_the_registered_operator_share_memory_with_nothing(form: Form) -> None:
    call = build(form)
    result = [output for output in call.call_registered() if output.numel()]
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*result, *call.tensors().values())]
    assert all(memory.count(output.untyped_storage().data_ptr()) == 1 for output in result)


@each_backend
def test_x_may_be_a_feature_and_the_reference_too(backend: str) -> None:
    call = build(Form(terms=2, reference=True))
    x = call.arguments["x"]
    shared = call.given(features=[x, x], reference=x).run(backend)
    assert_same_bits(shared, call.given(features=[x.clone(), x.clone()], reference=x.clone()).run(backend))
    assert shared.errors[:, 0].tolist() == [0.0, 0.0]


# --- modes ------------------------------------------------------------------------------------


def differentiable(call: Call) -> list[str]:
    return [
        name
        for name, tensor in call.tensors().items()
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e4m3fn
    ]


DIFFERENTIABLE = differentiable(build(EVERYTHING))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
def test_an_input_that_requires_grad_is_refused_in_grad_mode(caller: str, name: str) -> None:
    call = build(EVERYTHING)
    call.tensors()[name].requires_grad_()
    with pytest.raises(RuntimeError, match="forward-only: an input requires grad"):
        call.call_registered() if caller == "registered" else call.run(caller)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
def test_parameters_are_taken_where_no_gradient_is_wanted(caller: str, mode: Callable) -> None:
    call = build(replace(EVERYTHING, reference=False))
    expected = call.run(BACKENDS[0] if caller == "registered" else caller)
    for name in DIFFERENTIABLE:
        if name in call.tensors():
            call.tensors()[name].requires_grad_()
    with mode():
        found = call.call_registered()[:2] if caller == "registered" else call.run(caller)[:2]
    assert_same_bits(found, expected[:2])
    assert not found[0].requires_grad


@each_backend
@each_precision
def test_autocast_changes_neither_dtypes_nor_values(precision: Precision, backend: str) -> None:
    call = build(EVERYTHING.of(precision))
    expected = call.run(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(call.run(backend), expected)


@each_backend
def test_the_default_dtype_changes_nothing(backend: str) -> None:
    call = build(EVERYTHING)
    expected = call.run(backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(call.run(backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_registered_operator_gives_the_bits_of_the_first_backend() -> None:
    for form in UPDATES.values():
        found = build(form).call_registered()
        expected = build(form).run(BACKENDS[0])
        assert_same_bits(
            [output for output in found if output.numel()],
            [output for output in expected if output is not None],
        )


# --- refusals ---------------------------------------------------------------------------------

transposed = {
    name: laid_out(tensor, "transposed")[0]
    for name, tensor in (
        build(replace(EVERYTHING, gate="BND", shift="BND", scale="BND", packed=False)).tensors().items()
    )
    if tensor.ndim == 3
}
# what is wrong: (argument that the message must name, replaced arguments)
WRONG = {
    "x-rank": ("x", lambda a: {"x": a["x"][0]}),
    "x-dtype": ("x", lambda a: {"x": a["x"].int()}),
    "x-stride": ("x", lambda a: {"x": transposed["x"]}),
    "feature-shape": (
        "features[1]",
        lambda a: {"features": [a["features"][0], a["features"][1][:, :5], *a["features"][2:]]},
    ),
    "feature-batch": ("features[0]", lambda a: {"features": [a["features"][0][:1], *a["features"][1:]]}),
    "feature-dtype": ("features[0]", lambda a: {"features": [feature.int() for feature in a["features"]]}),
    "feature-mixed": (
        "features[2]",
        lambda a: {"features": [*a["features"][:2], a["features"][2].half(), *a["features"][3:]]},
    ),
    "feature-stride": (
        "features[6]",
        lambda a: {"features": [*a["features"][:6], transposed["features[0]"]]},
    ),
    "feature-device": (
        "features[0]",
        lambda a: {"features": [a["features"][0].to("meta"), *a["features"][1:]]},
    ),
    "gates-shape": ("gates", lambda a: {"gates": a["gates"][..., :-1]}),
    "gates-frames": ("gates", lambda a: {"gates": torch.ones(3, 2, 4, 24)}),
    "gates-batch": ("gates", lambda a: {"gates": torch.ones(3, 3, 24)}),
    "gates-unpacked": ("gates", lambda a: {"gates": torch.ones(24)}),
    "gates-no-rows": ("gates", lambda a: {"gates": a["gates"][:0]}),
    "gates-dtype": ("gates", lambda a: {"gates": a["gates"].long()}),
    "gates-stride": ("gates", lambda a: {"gates": transposed["gates"], "gate_index": None}),
    "gates-absent": ("gates", lambda a: {"gates": None}),
    "gate-index-length": ("gate_index", lambda a: {"gate_index": a["gate_index"][1:]}),
    "gate-index-dtype": ("gate_index", lambda a: {"gate_index": a["gate_index"].long()}),
    "gate-index-high": (
        "gate_index",
        lambda a: {"gate_index": torch.tensor([0, 1, 2, 3, 0, 0, 0], dtype=torch.int32)},
    ),
    "gate-index-low": (
        "gate_index",
        lambda a: {"gate_index": torch.tensor([0, 1, 2, -2, 0, 0, 0], dtype=torch.int32)},
    ),
    "weights-length": ("weights", lambda a: {"weights": torch.ones(6)}),
    "weights-dtype": ("weights", lambda a: {"weights": a["weights"].double()}),
    "scales-shape": ("scales", lambda a: {"scales": a["scales"][:, :, :-1]}),
    "scales-dtype": ("scales", lambda a: {"scales": a["scales"].half()}),
    "norm": ("norm", lambda a: {"norm": 4}),
    "norm-negative": ("norm", lambda a: {"norm": -1}),
    "shift-shape": ("shift", lambda a: {"shift": torch.ones(23)}),
    "shift-dtype": ("shift", lambda a: {"shift": a["shift"].int()}),
    "shift-stride": ("shift", lambda a: {"shift": transposed["shift"]}),
    "shift-alone": (
        "shift",
        lambda a: {"norm": 0, "scale": None, "row_slots": None, "norm_weight": None, "norm_bias": None},
    ),
    "scale-shape": ("scale", lambda a: {"scale": torch.ones(2, 7, 24)}),
    "scale-stride": ("scale", lambda a: {"scale": transposed["scale"]}),
    "scale-alone": (
        "scale",
        lambda a: {"norm": 0, "shift": None, "row_slots": None, "norm_weight": None, "norm_bias": None},
    ),
    "weight-shape": ("norm_weight", lambda a: {"norm_weight": torch.ones(25)}),
    "weight-identity": ("norm_weight", lambda a: {"norm": 3, "norm_bias": None}),
    "bias-shape": ("norm_bias", lambda a: {"norm_bias": torch.ones(1, 24)}),
    "bias-dtype": ("norm_bias", lambda a: {"norm_bias": torch.ones(24, dtype=torch.int32)}),
    "bias-stride": ("norm_bias", lambda a: {"norm_bias": torch.ones(48)[::2]}),
    "row-slots-shape": ("row_slots", lambda a: {"row_slots": a["row_slots"][:, 1:]}),
    "row-slots-dtype": ("row_slots", lambda a: {"row_slots": a["row_slots"].long()}),
    "row-slots-high": ("row_slots", lambda a: {"row_slots": torch.full((2, 6), 5, dtype=torch.int32)}),
    "row-slots-low": ("row_slots", lambda a: {"row_slots": torch.full((2, 6), -2, dtype=torch.int32)}),
    "row-slots-alone": (
        "row_slots",
        lambda a: {"norm": 0, "shift": None, "scale": None, "norm_weight": None, "norm_bias": None},
    ),
    "row-count": ("row_count", lambda a: {"row_count": -1}),
    "reference-shape": ("reference", lambda a: {"reference": a["reference"][:, :1]}),
    "reference-dtype": ("reference", lambda a: {"reference": a["reference"].long()}),
    "reference-stride": ("reference", lambda a: {"reference": transposed["reference"]}),
    "reference-alone": (
        "reference",
        lambda a: {"features": [], "gates": None, "gate_index": None, "weights": None, "scales": None},
    ),
}


@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_in_the_error(case: tuple[str, Callable], caller: str) -> None:
    name, change = case
    call = build(EVERYTHING)
    call.arguments |= change(call.arguments)
    call.form = replace(call.form, slot="")
    with pytest.raises(REFUSED, match=rf"(^|\s){re.escape(name)}: "):
        call.call_registered() if caller == "registered" or name == "norm" else call.run(caller)


def test_the_form_that_is_spoiled_above_is_accepted() -> None:
    build(EVERYTHING).call_registered()
    for name, tensor in transposed.items():
        assert tensor.stride(-1) != 1, name
