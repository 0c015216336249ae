"""residual_update_scatter_: what is stored, what is added, what must stay untouched."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    FLOAT8,
    PRECISIONS,
    REFUSED,
    SCATTERS,
    Call,
    Form,
    Precision,
    assert_same_bits,
    build,
    each_backend,
    each_dtype,
    each_layout,
    each_precision,
    each_scatter,
    exact_modulated,
    exact_update,
    laid_out,
    random_values,
    verify,
)
from torch import Tensor

from fastcache.ops import Norm, ResidualUpdate

EVERYTHING = SCATTERS["refresh-all"]
REFRESH = SCATTERS["refresh"]
SLOTS = ("float32", "float16", "bfloat16", FLOAT8)
EXACT_STORES = {name: form for name, form in SCATTERS.items() if form.slot != FLOAT8 and not form.scales}
# those whose slot can stand in `residual_update`: one dtype, and row scales for all terms or none
PLAIN_SUMS = EXACT_STORES | {"float8-store": SCATTERS["float8-store"]}


def of_dtype(form: Form, dtype: torch.dtype) -> Form:
    """The form with one dtype everywhere."""
    name = str(dtype).removeprefix("torch.")
    return replace(
        form, x=name, feature=name, vector=name, fresh=name, slot=FLOAT8 if form.slot == FLOAT8 else name
    )


def updated_by(
    call: Call, backend: str, newest: torch.Tensor, scales: torch.Tensor | None = None
) -> ResidualUpdate:
    """`residual_update` with the slot's term replaced by a plain feature."""
    plain = build(replace(call.form, slot=""))
    position = len(call.arguments["features"]) if call.form.position < 0 else call.form.position
    features = list(call.arguments["features"])
    features.insert(position, newest)
    kept = {name: call.arguments[name] for name in plain.arguments if name not in ("features", "scales")}
    return plain.given(**kept, features=features, scales=scales).run(backend)


# --- values -----------------------------------------------------------------------------------


@each_backend
@each_precision
@each_scatter
def test_values_lie_within_the_rounding_bounds(form: Form, precision: Precision, backend: str) -> None:
    verify(form.of(precision), backend)


@each_backend
@each_precision
@pytest.mark.parametrize(
    "form",
    [
        Form(terms=2, slot="float32", fresh_rows=30, gate="BD"),
        Form(terms=1, slot=FLOAT8, fresh_rows=30, norm=Norm.LAYER, shift="BD", scale="BD"),
    ],
    ids=["sum", "modulated-float8"],
)
def test_the_error_is_at_most_a_tenth_above_that_of_the_definition(
    form: Form, precision: Precision, backend: str
) -> None:
    form = replace(form.of(precision), batch=2, tokens=48, channels=1152)
    call, defining = build(form), build(form)
    found, defined = call.run(backend), defining.run("eager")
    exact, _ = exact_update(call)
    wanted = {"x": exact, "h": exact_modulated(call, exact) if form.norm else None}
    for name, values in wanted.items():
        if values is not None:
            error, defined_error = (
                (getattr(result, name).double() - values).square().mean().sqrt()
                for result in (found, defined)
            )
            assert values.numel() >= 1e5 and defined_error > 0
            assert error <= 1.1 * defined_error


@each_backend
@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("fresh", SLOTS[:3])
@pytest.mark.parametrize("x", SLOTS[:3])
def test_stream_slot_and_fresh_rows_may_have_different_dtypes(
    x: str, fresh: str, slot: str, backend: str
) -> None:
    verify(
        Form(terms=0, x=x, vector=x, fresh=fresh, slot=slot, fresh_rows=3, gate="BD", channels=37), backend
    )


@each_backend
@each_layout
@each_scatter
def test_strided_values_lie_within_the_rounding_bounds(form: Form, layout: str, backend: str) -> None:
    verify(replace(form, channels=27, layout=layout, vector_layout="chunk", offset=1), backend)


@each_backend
@pytest.mark.parametrize(
    "form",
    [EVERYTHING, SCATTERS["float8-refresh"], SCATTERS["store"]],
    ids=["refresh-all", "float8-refresh", "store"],
)
@pytest.mark.parametrize("precision", [PRECISIONS["fp32"], PRECISIONS["bf16"]], ids=["fp32", "bf16"])
def test_misaligned_slots_are_written_and_nothing_around_them(
    precision: Precision, form: Form, backend: str
) -> None:
    for offset in range(41):
        verify(
            replace(
                form.of(precision),
                channels=111,
                tokens=3,
                fresh_rows=form.fresh_rows and 2,
                rows=form.rows and 2,
                offset=offset,
            ),
            backend,
        )


@each_backend
@each_dtype
@pytest.mark.parametrize("channels", [1, 2, 8, 15, 16, 17, 33, 111, 769, 1152, 1160, 1536, 5125])
@pytest.mark.parametrize(
    "form", [EVERYTHING, SCATTERS["float8-refresh"]], ids=["refresh-all", "float8-refresh"]
)
def test_any_number_of_channels(form: Form, channels: int, dtype: torch.dtype, backend: str) -> None:
    verify(of_dtype(replace(form, batch=1, tokens=5, channels=channels), dtype), backend)


@each_backend
@pytest.mark.parametrize("tokens", [0, 1, 3, 15, 16, 17, 70])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("rows", [0, 1, None])
def test_any_batch_and_any_number_of_tokens(rows: int | None, batch: int, tokens: int, backend: str) -> None:
    verify(replace(EVERYTHING, batch=batch, tokens=tokens, rows=min(tokens, 2), fresh_rows=rows), backend)
    verify(replace(SCATTERS["float8-refresh"], batch=batch, tokens=tokens, fresh_rows=rows), backend)


@each_backend
@pytest.mark.parametrize("fresh_rows", [0, 1, 5, 6, 9])
@each_dtype
def test_any_number_of_fresh_rows(dtype: torch.dtype, fresh_rows: int, backend: str) -> None:
    verify(of_dtype(replace(EVERYTHING, fresh_rows=fresh_rows), dtype), backend)


@each_backend
@pytest.mark.parametrize("terms", [0, 1, 2, 6, 55, 1023])
def test_any_number_of_other_terms_up_to_1023(terms: int, backend: str) -> None:
    verify(replace(EVERYTHING, terms=terms, batch=1, tokens=3, channels=11, position=terms // 2), backend)


@each_backend
def test_the_slot_counts_as_one_of_1024_terms(backend: str) -> None:
    call = build(Form(terms=1024, batch=1, tokens=1, channels=1, slot="float32"))
    before = call.snapshot()
    with pytest.raises(REFUSED, match="features: at most 1024 terms in one call, got 1025"):
        call.run(backend)
    assert_same_bits(call.snapshot()["slot"], before["slot"])


# --- what is stored ---------------------------------------------------------------------------


@each_backend
@each_dtype
@pytest.mark.parametrize("slot", SLOTS[:3])
def test_the_store_is_a_copy_with_one_rounding(slot: str, dtype: torch.dtype, backend: str) -> None:
    call = build(replace(of_dtype(REFRESH, dtype), slot=slot, channels=37))
    a = call.arguments
    expected = a["slot"].clone()
    for b in range(2):
        for n in range(6):
            row = int(a["fresh_slots"][b, n])
            if row >= 0:
                expected[b, n] = a["fresh"][b, row].to(expected.dtype)
    call.run(backend)
    assert_same_bits(a["slot"], expected)


@each_backend
@each_dtype
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_a_float8_row_is_within_its_rounding_of_the_fresh_row_and_uses_the_whole_range(
    magnitude: float, dtype: torch.dtype, backend: str
) -> None:
    call = build(of_dtype(replace(SCATTERS["float8-store"], channels=97), dtype))
    a = call.arguments
    a["fresh"].mul_(magnitude)
    call.run(backend)
    stored, fresh, scale = a["slot"].double(), a["fresh"].double(), a["slot_scale"].double()[..., None]
    # three bits of mantissa; below 2^-6 the steps are 2^-9; the scale itself is rounded
    assert bool(
        (
            (stored * scale - fresh).abs() <= 1.001 * torch.maximum(2.0**-4 * fresh.abs(), 2.0**-10 * scale)
        ).all()
    )
    assert bool((stored.abs().amax(-1) == 448).all())


@each_backend
def test_a_float8_row_of_zeros_has_scale_one(backend: str) -> None:
    call = build(SCATTERS["float8-store"])
    call.arguments["fresh"][1, 2] = 0.0
    call.run(backend)
    assert call.arguments["slot_scale"][1, 2] == 1.0
    assert not call.arguments["slot"][1, 2].float().any()


@each_backend
def test_rows_without_a_fresh_row_keep_their_float8_scale(backend: str) -> None:
    call = build(SCATTERS["float8-refresh"])
    a = call.arguments
    kept, before = a["fresh_slots"] < 0, a["slot_scale"].clone()
    assert bool(kept.any()) and not bool(kept.all())
    call.run(backend)
    assert_same_bits(a["slot_scale"][kept], before[kept])
    assert not bool((a["slot_scale"][~kept] == before[~kept]).any())


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("channel", [0, 15, 16, 36])
def test_a_special_value_in_a_float8_row_is_stored_as_the_definition_does(
    channel: int, value: float, backend: str
) -> None:
    stored = []
    for name in (backend, "eager"):
        call = build(replace(SCATTERS["float8-store"], channels=37))
        call.arguments["fresh"][0, 1, channel] = value
        call.run(name)
        assert bool(torch.isnan(call.arguments["slot"][0, 1, channel].float()))
        stored.append((call.arguments["slot"].float().nan_to_num(nan=1e9), call.arguments["slot_scale"]))
    assert_same_bits(stored[0], stored[1])


@each_backend
@pytest.mark.parametrize("slot", [FLOAT8, "float16", "bfloat16"])
def test_the_store_rounds_any_pattern_of_bits_as_pytorch_does(slot: str, backend: str) -> None:
    patterns = torch.randint(
        -(2**31), 2**31, (2**17,), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    )
    if (
        slot == FLOAT8
    ):  # magnitudes of float8 and ties between its neighbours; 448 in each row makes the scale one
        patterns = torch.cat(
            [torch.arange(0x3A000000, 0x43E00000, 2**10), torch.arange(0x3A000000, 0x43E00000, 2**19) + 2**19]
        )
    else:  # NaN of every kind: quiet and signalling, with payloads in high and low bits
        patterns = torch.cat(
            [patterns, 0x7F800000 + 2 ** torch.arange(23), 0x7FC00000 + 2 ** torch.arange(22)]
        )
    values = patterns.to(torch.int32).view(torch.float32)
    values = F.pad(values, (0, -values.numel() % 63)).reshape(1, -1, 63)
    values = torch.cat([torch.full((1, values.shape[1], 1), 448.0), values], -1)
    values[:, 1::2] *= -1 if slot == FLOAT8 else 1
    call = build(Form(batch=1, tokens=values.shape[1], channels=64, terms=0, slot=slot, need_x=False)).given(
        fresh=values
    )
    call.run(backend)
    found, expected = call.arguments["slot"], values.to(getattr(torch, slot))
    nan = torch.isnan(values)
    assert_same_bits(torch.isnan(found.float()), nan)
    as_bits = torch.uint8 if slot == FLOAT8 else torch.int16
    assert torch.equal(found.view(as_bits)[~nan], expected.view(as_bits)[~nan])


@each_backend
def test_rows_that_are_not_packed_and_not_summed_are_still_stored(backend: str) -> None:
    call = build(replace(SCATTERS["store-without-x"], rows=1))
    call = call.given(
        row_slots=torch.tensor([[-1, -1, -1, 0, -1, -1]] * 2, dtype=torch.int32),
        fresh_slots=torch.tensor([[0, 1, 2, -1, 0, 1]] * 2, dtype=torch.int32),
    )
    call.run(backend)
    assert_same_bits(call.arguments["slot"][:, [0, 1, 2, 4, 5]], call.arguments["fresh"][:, [0, 1, 2, 0, 1]])


# --- special values ---------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("slot", SLOTS)
def test_what_an_unwritten_slot_holds_does_not_matter_once_every_row_is_fresh(
    slot: str, backend: str
) -> None:
    call = build(Form(terms=0, slot=slot, gate="BD"))
    expected = build(Form(terms=0, slot=slot, gate="BD")).run(backend)
    call.arguments["slot"].view(torch.uint8).fill_(0xFF)
    if slot == FLOAT8:
        call.arguments["slot_scale"].fill_(float("nan"))
    assert_same_bits(call.run(backend), expected)


@each_backend
@pytest.mark.parametrize("slot", SLOTS)
def test_nan_in_fresh_rows_that_no_token_takes_is_not_read(slot: str, backend: str) -> None:
    call = build(Form(terms=0, slot=slot, fresh_rows=3))
    call = call.given(fresh_slots=torch.tensor([[1, -1, 1, -1, -1, 1]] * 2, dtype=torch.int32))
    call.arguments["fresh"][:, [0, 2]] = float("nan")
    assert bool(torch.isfinite(call.run(backend).x).all())
    assert bool(torch.isfinite(call.arguments["slot"].float()).all())


@each_backend
@pytest.mark.parametrize("channel", [0, 15, 16, 36])
def test_nan_in_a_fresh_row_stays_with_the_tokens_that_take_it(channel: int, backend: str) -> None:
    call = build(Form(terms=1, slot="bfloat16", fresh_rows=3, channels=37))
    call = call.given(fresh_slots=torch.tensor([[0, 1, 2, -1, 1, 0]] * 2, dtype=torch.int32))
    call.arguments["fresh"][0, 1, channel] = float("nan")
    assert torch.isnan(call.run(backend).x).nonzero().tolist() == [[0, 1, channel], [0, 4, channel]]
    assert torch.isnan(call.arguments["slot"]).nonzero().tolist() == [[0, 1, channel], [0, 4, channel]]


# --- equalities within a backend --------------------------------------------------------------


@each_backend
@each_precision
@pytest.mark.parametrize("form", EXACT_STORES.values(), ids=EXACT_STORES)
def test_with_every_row_fresh_it_is_an_update_with_the_fresh_feature(
    form: Form, precision: Precision, backend: str
) -> None:
    call = build(replace(form, fresh_rows=None).of(precision))
    expected = updated_by(call, backend, call.arguments["fresh"])
    found = call.run(backend)
    assert_same_bits(found[:2], expected[:2])


@each_backend
@each_precision
@pytest.mark.parametrize(
    "name", ["refresh", "refresh-after-terms", "refresh-first", "refresh-modulated", "refresh-all"]
)
def test_with_no_row_fresh_it_is_an_update_with_the_slot(
    name: str, precision: Precision, backend: str
) -> None:
    call = build(SCATTERS[name].of(precision))
    call = call.given(fresh_slots=torch.full((2, 6), -1, dtype=torch.int32))
    before = call.arguments["slot"].clone()
    expected = updated_by(call, backend, before)
    assert_same_bits(call.run(backend)[:2], expected[:2])
    assert_same_bits(call.arguments["slot"], before)


@each_backend
@each_precision
@pytest.mark.parametrize("form", PLAIN_SUMS.values(), ids=PLAIN_SUMS)
def test_the_sum_reads_what_was_stored(form: Form, precision: Precision, backend: str) -> None:
    call = build(form.of(precision))
    found = call.run(backend)
    slot, slot_scale = call.arguments["slot"], call.arguments["slot_scale"]
    expected = updated_by(call, backend, slot, None if slot_scale is None else slot_scale[None])
    assert_same_bits(found[:2], expected[:2])


@each_backend
def test_renumbering_fresh_rows_and_map_changes_nothing(backend: str) -> None:
    call, other = build(EVERYTHING), build(EVERYTHING)
    order = torch.tensor([2, 0, 3, 1])
    slots = other.arguments["fresh_slots"]
    renumbered = torch.where(slots >= 0, order[slots.clamp(min=0).long()].int(), slots)
    fresh = torch.empty_like(other.arguments["fresh"])
    fresh[:, order] = other.arguments["fresh"]
    other = other.given(fresh=fresh, fresh_slots=renumbered)
    assert_same_bits(other.run(backend), call.run(backend))
    assert_same_bits(other.arguments["slot"], call.arguments["slot"])


@each_backend
@pytest.mark.parametrize("slot", SLOTS)
def test_the_map_of_all_rows_in_order_equals_no_map(slot: str, backend: str) -> None:
    form = Form(terms=2, slot=slot, gate="BD", position=1)
    call, mapped = build(form), build(form)
    mapped = mapped.given(fresh_slots=torch.arange(6, dtype=torch.int32).expand(2, 6))
    assert_same_bits(mapped.run(backend), call.run(backend))
    assert_same_bits(mapped.arguments["slot"], call.arguments["slot"])


@each_backend
def test_position_minus_one_is_the_last_term(backend: str) -> None:
    assert_same_bits(
        build(replace(EVERYTHING, position=-1)).run(backend),
        build(replace(EVERYTHING, position=3)).run(backend),
    )


@each_backend
@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_newest_feature_is_the_slot_wherever_it_stands(position: int, backend: str) -> None:
    call = build(Form(terms=2, slot="float32", position=position, reference=True))
    call = call.given(reference=call.arguments["fresh"])
    assert call.run(backend).errors[:, 0].tolist() == [0.0, 0.0]


@each_backend
@each_precision
def test_leaving_out_x_changes_neither_h_nor_errors_nor_the_slot(precision: Precision, backend: str) -> None:
    for form in (EVERYTHING, replace(EVERYTHING, rows=None)):
        kept, left_out = (build(replace(form, need_x=need_x).of(precision)) for need_x in (True, False))
        assert_same_bits(left_out.run(backend)[1:], kept.run(backend)[1:])
        assert_same_bits(left_out.arguments["slot"], kept.arguments["slot"])


@each_backend
@each_dtype
def test_twenty_runs_on_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    form = of_dtype(replace(EVERYTHING, tokens=24, channels=769, rows=20, fresh_rows=11), dtype)
    before = torch.get_num_threads()
    try:
        expected = None
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            call = build(form)
            result = (*call.run(backend), call.arguments["slot"])
            expected = expected or result
            assert_same_bits(result, expected)
    finally:
        torch.set_num_threads(before)


# --- memory -----------------------------------------------------------------------------------


@each_backend
@each_scatter
def test_outputs_share_memory_with_nothing(form: Form, backend: str) -> None:
    call = build(form)
    result = [output for output in call.run(backend) if output is not None]
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*result, *call.tensors().values())]
    assert all(memory.count(output.untyped_storage().data_ptr()) == 1 for output in result)


# how an input may lie in the memory of the slot [B, N, D]: all of it, one token further, or other shapes and
# strides
SHARED_MEMORY = {
    "same": ("x", "fresh", "features", "gates", "shift", "scale", "reference"),
    "shifted": ("x", "fresh", "features", "gates", "shift", "scale", "reference"),
    "swapped": ("x", "fresh", "features", "gates", "reference"),
    "one-token": ("x", "features", "fresh", "shift", "reference"),  # expanded to all
    "rows": ("gates", "shift", "scale"),  # [B, D]
    "row": ("gates", "shift", "scale", "norm_weight", "norm_bias"),  # [D]
}


def overlapping(call: Call, memory: str) -> Tensor:
    """A tensor that shares memory with the slot."""
    slot, buffer = call.arguments["slot"], call.buffers["slot"]
    return {
        "same": lambda: slot,
        "shifted": lambda: buffer.as_strided(
            slot.shape, slot.stride(), slot.storage_offset() + slot.stride(1)
        ),
        "swapped": lambda: buffer.as_strided(slot.shape, (24, 48, 1), slot.storage_offset()),
        "one-token": lambda: slot[:1, 3:4].expand_as(slot),
        "rows": lambda: slot[:, 2],
        "row": lambda: slot[1, 5],
    }[memory]()


@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
@pytest.mark.parametrize(
    ("memory", "name"), [(memory, name) for memory, names in SHARED_MEMORY.items() for name in names]
)
def test_a_slot_that_overlaps_an_input_is_refused_or_gives_the_result_of_copies(
    memory: str, name: str, caller: str
) -> None:
    form = Form(
        terms=1,
        slot="float32",
        gate="BND",
        norm=Norm.LAYER,
        shift="BND",
        scale="BND",
        affine=True,
        reference=True,
    )
    shared, copies = build(form), build(form)
    for call in (shared, copies):
        call.buffers["slot"][-64:] = 0.5  # sentinels that a shifted view reads
        tensor = overlapping(call, memory)
        tensor = tensor.clone() if call is copies else tensor
        call.arguments[name] = [tensor] if name == "features" else tensor
    before = shared.arguments["slot"].clone()
    expected = copies.run("eager")
    try:
        found = shared.call_registered() if caller == "registered" else shared.run(caller)
    except REFUSED as error:
        assert re.search(r"(^|\s)slot: ", str(error)), error
        assert_same_bits(shared.arguments["slot"], before)
        return
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert_same_bits(shared.arguments["slot"], copies.arguments["slot"])


@each_backend
@pytest.mark.parametrize("shape", [(1, 6, 24), (2, 1, 24)], ids=str)
def test_a_slot_whose_rows_share_memory_is_refused_by_name(shape: tuple[int, ...], backend: str) -> None:
    call = build(Form(terms=0, slot="float32"))
    call = call.given(slot=torch.zeros(shape).expand(2, 6, 24))
    with pytest.raises(REFUSED, match=r"(^|\s)slot: "):
        call.run(backend)


@each_backend
def test_layers_of_one_buffer_are_not_taken_for_overlapping(backend: str) -> None:
    buffer = random_values((2, 3, 6, 24), "float32", 1)
    call = build(Form(terms=1, slot="float32", fresh_rows=3)).given(
        slot=buffer[:, 1], features=[buffer[:, 0]]
    )
    expected = (
        build(Form(terms=1, slot="float32", fresh_rows=3))
        .given(slot=buffer[:, 1].clone(), features=[buffer[:, 0].clone()])
        .run(backend)
    )
    others = buffer[:, [0, 2]].clone()
    assert_same_bits(call.run(backend), expected)
    assert_same_bits(buffer[:, [0, 2]], others)


# --- modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "slot",
        "fresh",
        "features[0]",
        "gates",
        "weights",
        "shift",
        "scale",
        "norm_weight",
        "norm_bias",
        "reference",
    ],
)
@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
def test_an_input_that_requires_grad_is_refused_in_grad_mode_and_nothing_is_stored(
    caller: str, name: str
) -> None:
    call = build(EVERYTHING)
    before = call.snapshot()
    call.tensors()[name].requires_grad_()
    with pytest.raises(RuntimeError, match="forward-only: an input requires grad"):
        call.call_registered() if caller == "registered" else call.run(caller)
    assert_same_bits(call.buffers["slot"].detach().view(torch.uint8), before["slot"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
def test_it_runs_and_stores_where_no_gradient_is_wanted(caller: str, mode: Callable) -> None:
    call, expecting = build(replace(EVERYTHING, reference=False)), build(replace(EVERYTHING, reference=False))
    expected = expecting.run(BACKENDS[0] if caller == "registered" else caller)
    with mode():
        for name in ("x", "features[0]", "gates", "shift"):
            call.tensors()[name].requires_grad_()
        found = call.call_registered() if caller == "registered" else call.run(caller)
    assert_same_bits(found[:2], expected[:2])
    assert_same_bits(call.arguments["slot"], expecting.arguments["slot"])


@each_backend
def test_tensors_made_in_inference_mode_are_taken_in_inference_mode(backend: str) -> None:
    expecting = build(EVERYTHING)
    expected = expecting.run(backend)
    with torch.inference_mode():
        call = build(EVERYTHING)
        assert call.arguments["slot"].is_inference()
        assert_same_bits(call.run(backend), expected)
    assert_same_bits(call.arguments["slot"].clone(), expecting.arguments["slot"])


@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
def test_the_version_counter_of_the_slot_rises(caller: str) -> None:
    call = build(EVERYTHING)
    before = call.arguments["slot"]._version
    call.call_registered() if caller == "registered" else call.run(caller)
    assert call.arguments["slot"]._version > before
    assert call.arguments["fresh"]._version == build(EVERYTHING).arguments["fresh"]._version


@each_backend
@each_precision
def test_autocast_changes_neither_dtypes_nor_values(precision: Precision, backend: str) -> None:
    call, plain = build(EVERYTHING.of(precision)), build(EVERYTHING.of(precision))
    expected = plain.run(backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(call.run(backend), expected)
    assert_same_bits(call.arguments["slot"], plain.arguments["slot"])


# --- refusals ---------------------------------------------------------------------------------


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return laid_out(tensor, "transposed")[0]


FLOAT8_FORM = replace(SCATTERS["float8-refresh"], norm=Norm.LAYER, rows=3, gate="BD", packed=True)
# what is wrong: (argument that the message must name, replaced arguments)
WRONG = {
    "slot-shape": ("slot", lambda a: {"slot": a["slot"][:, :-1]}),
    "slot-dtype": ("slot", lambda a: {"slot": torch.zeros(2, 6, 24, dtype=torch.int32), "slot_scale": None}),
    "slot-stride": ("slot", lambda a: {"slot": transposed(a["slot"])}),
    "slot-device": ("slot", lambda a: {"slot": a["slot"].to("meta")}),
    "fresh-rank": ("fresh", lambda a: {"fresh": a["fresh"][0]}),
    "fresh-batch": ("fresh", lambda a: {"fresh": a["fresh"][:1]}),
    "fresh-channels": ("fresh", lambda a: {"fresh": a["fresh"][..., 1:]}),
    "fresh-rows": ("fresh", lambda a: {"fresh_slots": None}),
    "fresh-dtype": ("fresh", lambda a: {"fresh": a["fresh"].int()}),
    "fresh-float8": ("fresh", lambda a: {"fresh": a["fresh"].to(torch.float8_e4m3fn)}),
    "fresh-stride": ("fresh", lambda a: {"fresh": transposed(a["fresh"])}),
    "fresh-slots-shape": ("fresh_slots", lambda a: {"fresh_slots": a["fresh_slots"][:, 1:]}),
    "fresh-slots-dtype": ("fresh_slots", lambda a: {"fresh_slots": a["fresh_slots"].long()}),
    "fresh-slots-high": (
        "fresh_slots",
        lambda a: {"fresh_slots": torch.full((2, 6), a["fresh"].shape[1], dtype=torch.int32)},
    ),
    "fresh-slots-low": ("fresh_slots", lambda a: {"fresh_slots": torch.full((2, 6), -2, dtype=torch.int32)}),
    "position-high": ("position", lambda a: {"position": len(a["features"]) + 1}),
    "position-low": ("position", lambda a: {"position": -2}),
    "feature-shape": (
        "features[1]",
        lambda a: {"features": [a["features"][0], a["features"][1][:1], *a["features"][2:]]},
    ),
    "gate-index-high": ("gate_index", lambda a: {"gate_index": torch.full_like(a["gate_index"], 3)}),
    "gate-index-length": ("gate_index", lambda a: {"gate_index": a["gate_index"][1:]}),
    "weights-length": ("weights", lambda a: {"weights": torch.ones(1)}),
    "scales-length": ("scales", lambda a: {"scales": torch.ones(1, 2, 6)}),
    "row-slots-high": ("row_slots", lambda a: {"row_slots": torch.full((2, 6), 3, dtype=torch.int32)}),
    "row-slots-low": ("row_slots", lambda a: {"row_slots": torch.full((2, 6), -7, dtype=torch.int32)}),
    "reference-shape": ("reference", lambda a: {"reference": torch.ones(2, 6, 25)}),
    "scale-shape": ("scale", lambda a: {"scale": torch.ones(23)}),
    "slot-scale-unwanted": (
        "slot_scale",
        lambda a: {"slot": a["slot"].float(), "slot_scale": torch.ones(2, 6)},
    ),
    "slot-scale-absent": (
        "slot_scale",
        lambda a: {"slot": a["slot"].to(torch.float8_e4m3fn), "slot_scale": None},
    ),
    "slot-scale-shape": (
        "slot_scale",
        lambda a: {"slot": a["slot"].to(torch.float8_e4m3fn), "slot_scale": torch.ones(2, 5)},
    ),
    "slot-scale-dtype": (
        "slot_scale",
        lambda a: {"slot": a["slot"].to(torch.float8_e4m3fn), "slot_scale": torch.ones(2, 6).half()},
    ),
}


@pytest.mark.parametrize("caller", [*BACKENDS, "registered"])
@pytest.mark.parametrize("form", [EVERYTHING, FLOAT8_FORM], ids=["float32", "float8"])
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_in_the_error_and_nothing_is_stored(
    case: tuple[str, Callable], form: Form, caller: str
) -> None:
    name, change = case
    call = build(form)
    before = call.snapshot()
    call.arguments |= change(call.arguments)
    with pytest.raises(REFUSED, match=rf"(^|\s){re.escape(name)}: "):
        call.call_registered() if caller == "registered" else call.run(caller)
    after = call.snapshot()
    assert all(torch.equal(after[buffer], bytes_) for buffer, bytes_ in before.items())


@pytest.mark.parametrize("form", [EVERYTHING, FLOAT8_FORM], ids=["float32", "float8"])
def test_the_forms_that_are_spoiled_above_are_accepted(form: Form) -> None:
    build(form).call_registered()
