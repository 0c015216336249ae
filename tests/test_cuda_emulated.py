"""Values of the CUDA kernels without a GPU: every form of both operators on emulated thread blocks."""

from dataclasses import replace

import cases
import emulated
import pytest
import torch
from cases import (
    FORMS,
    LAYOUTS,
    PRECISIONS,
    SCATTERS,
    UPDATES,
    VECTOR_LAYOUTS,
    VECTOR_SHAPES,
    Form,
    assert_same_bits,
    each_form,
    each_precision,
    verify,
)
from tiers import thinned

from fastcache.backends import eager
from fastcache.ops import Norm

pytestmark = pytest.mark.slow  # the first one compiles the emulator
ALL, SCATTERED = UPDATES["all"], SCATTERS["refresh-all"]
BAD_GATE, BAD_SLOT = 1, 2


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.build()


@pytest.fixture(autouse=True)
def backend(kernels, monkeypatch):
    """`emulated` as one more backend of tests/cases.py."""
    run = cases.Call.run
    monkeypatch.setattr(
        cases.Call, "run", lambda call, name: kernels.call(call) if name == "emulated" else run(call, name)
    )
    kernels.seed(0)
    kernels.multiprocessors(1)
    yield
    assert kernels.take_errors() == 0


@each_precision
@each_form
def test_values_lie_within_the_rounding_bounds(form: Form, precision) -> None:
    verify(form.of(precision), "emulated")


@pytest.mark.parametrize("name", ["bf16", "autocast", "narrow-stream"])
@each_form
def test_values_of_wide_rows_lie_within_the_rounding_bounds(form: Form, name: str) -> None:
    verify(replace(form.of(PRECISIONS[name]), channels=1152, tokens=3), "emulated")


@pytest.mark.parametrize(
    "form",
    [UPDATES["packed-gates"], UPDATES["gated-per-token"], SCATTERS["refresh-between"]],
    ids=["packed-gates", "per-token", "refresh"],
)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 33])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_one_row_or_four_rows_per_thread(form: Form, tokens: int, multiprocessors: int, kernels) -> None:
    kernels.multiprocessors(multiprocessors)
    verify(replace(form.of(PRECISIONS["bf16"]), tokens=tokens, channels=1152), "emulated")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "packed-gates",
        "gated-per-frame",
        "modulated",
        "all",
        "refresh-between",
        "float8-refresh",
        "refresh-all",
    ],
)
def test_strided_values_lie_within_the_rounding_bounds(name: str, layout: str) -> None:
    verify(replace(FORMS[name].of(PRECISIONS["bf16"]), layout=layout), "emulated")


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
@pytest.mark.parametrize("packed", [False, True], ids=["shared", "packed"])
def test_vectors_of_every_shape_and_layout(shape: str, layout: str, packed: bool) -> None:
    form = Form(
        terms=3, gate=shape, packed=packed, norm=Norm.LAYER, shift=shape, scale=shape, vector_layout=layout
    )
    verify(form.of(PRECISIONS["fp32-vectors"]), "emulated")
    verify(replace(form, norm=0, shift="", scale="").of(PRECISIONS["fp32-vectors"]), "emulated")


@pytest.mark.parametrize("offset", thinned([0, 1, 2, 3, 4, 8], [0, 1, 8]))
@pytest.mark.parametrize("channels", thinned([1, 7, 8, 12, 72, 136, 260], [7, 72, 136]))
@pytest.mark.parametrize("form", [UPDATES["gated"], ALL, SCATTERED], ids=["sum", "rows", "scatter"])
def test_every_alignment_and_tail(form: Form, channels: int, offset: int) -> None:
    for precision in ("fp32", "bf16"):
        verify(
            replace(form.of(PRECISIONS[precision]), channels=channels, offset=offset, tokens=5), "emulated"
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "channels", [256, 1024, 1152, 1160, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 1155, 8191]
)
def test_rows_of_every_width_in_the_table_and_between(channels: int, precision: str) -> None:
    for form in (ALL, SCATTERS["float8-refresh"], SCATTERED):
        verify(
            replace(
                form.of(PRECISIONS[precision]), channels=channels, tokens=3, rows=form.rows and 2, batch=1
            ),
            "emulated",
        )


@pytest.mark.parametrize("form", [UPDATES["sum"], UPDATES["modulated"]], ids=["sum", "rows"])
@pytest.mark.parametrize("terms", [0, 1, 2, 63, 64, 65, 1024])
def test_any_number_of_terms(form: Form, terms: int) -> None:
    verify(replace(form.of(PRECISIONS["fp16"]), terms=terms, tokens=3), "emulated")


@pytest.mark.parametrize("terms", [64, 65, 1023])
@pytest.mark.parametrize("form", [SCATTERS["refresh-between"], SCATTERED], ids=["sum", "rows"])
def test_the_slot_among_any_number_of_terms(form: Form, terms: int) -> None:
    for position in (0, 40, -1):
        verify(replace(form.of(PRECISIONS["bf16"]), terms=terms, position=position, tokens=3), "emulated")


@pytest.mark.parametrize("fresh", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("slot", ["float32", "float16", "bfloat16", cases.FLOAT8])
@pytest.mark.parametrize("x", ["float32", "float16", "bfloat16"])
def test_stream_slot_and_fresh_rows_may_have_different_dtypes(x: str, slot: str, fresh: str) -> None:
    form = Form(terms=2, feature="bfloat16", x=x, slot=slot, fresh=fresh, fresh_rows=3, gate="BD")
    verify(form, "emulated")
    verify(replace(form, norm=Norm.RMS), "emulated")


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_any_batch_and_any_number_of_tokens_also_none(batch: int, tokens: int) -> None:
    for name in ("sum", "modulated", "packed-rows", "store", "refresh-modulated"):
        verify(replace(FORMS[name], batch=batch, tokens=tokens), "emulated")


@pytest.mark.parametrize("norm", [Norm.NONE, Norm.IDENTITY], ids=["sum", "rows"])
@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 1, 8), (2**31, 8, 1)), ((1, 2, 8), (8, 2**31, 1))], ids=["batch", "token"]
)
def test_strides_beyond_two_to_the_31_elements(
    shape: tuple[int, ...], strides: tuple[int, ...], norm: Norm
) -> None:
    x = torch.empty(2**31 + 8, dtype=torch.bfloat16).as_strided(
        shape, strides
    )  # pages that are not touched take no memory
    x.copy_(torch.randn(shape))
    found = (
        cases.build(
            Form(batch=shape[0], tokens=shape[1], channels=8, x="bfloat16", feature="bfloat16", norm=norm)
        )
        .given(x=x, features=[x])
        .run("emulated")
    )
    assert_same_bits(found.x, (x + x).contiguous())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("channels", [1152, 3072])
def test_the_order_in_which_threads_run_changes_no_bit(channels: int, seed: int, kernels) -> None:
    form = replace(ALL.of(PRECISIONS["bf16"]), channels=channels, tokens=3, rows=2)
    expected = cases.build(form).run("emulated")
    kernels.seed(seed + 1)
    assert_same_bits(cases.build(form).run("emulated"), expected)


@pytest.mark.parametrize("slot", ["float32", "float16", "bfloat16", cases.FLOAT8])
def test_the_store_rounds_any_pattern_of_bits_as_the_definition_does(slot: str) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 512, 64), generator=torch.Generator().manual_seed(1)).to(
        torch.int32
    )
    fresh = bits.view(torch.float32)
    fresh = torch.where(fresh.isnan(), 1.0, fresh)
    made = [
        cases.build(Form(batch=1, tokens=512, channels=64, terms=0, slot=slot)).given(fresh=fresh)
        for _ in range(2)
    ]
    made[0].run("emulated")
    eager.store_rows_(made[1].arguments["slot"], fresh, None, made[1].arguments["slot_scale"])
    assert_same_bits(made[0].arguments["slot"], made[1].arguments["slot"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", cases.FLOAT8])
def test_every_bit_pattern_of_a_feature_is_widened_exactly(dtype: str) -> None:
    kind = getattr(torch, dtype)
    feature = (
        (torch.arange(2**16).to(torch.uint16) if kind.itemsize == 2 else torch.arange(2**8).to(torch.uint8))
        .view(kind)
        .reshape(1, -1, 16)
    )
    call = cases.build(Form(batch=1, tokens=feature.shape[1], channels=16, feature=dtype)).given(
        x=torch.zeros(feature.shape), features=[feature]
    )
    found, expected = call.run("emulated").x, feature.float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65504.0])
def test_special_values_are_stored_in_float8_as_the_definition_does(value: float) -> None:
    form = Form(terms=0, slot=cases.FLOAT8, channels=72)
    verify(form, "emulated", lambda call: None)
    made = [cases.build(form) for _ in range(2)]
    for call in made:
        call.arguments["fresh"][0, 1, 5] = value
    made[0].run("emulated")
    eager.store_rows_(
        made[1].arguments["slot"], made[1].arguments["fresh"], None, made[1].arguments["slot_scale"]
    )
    slots = [call.arguments["slot"].float() for call in made]
    assert torch.equal(slots[0].isnan(), slots[1].isnan())
    assert torch.equal(slots[0].nan_to_num(0.0), slots[1].nan_to_num(0.0))
    assert_same_bits(made[0].arguments["slot_scale"], made[1].arguments["slot_scale"])


# --- bad indices: on a GPU nobody can raise, so they are reported later and write nothing -----------


@pytest.mark.parametrize("bad", [3, 2**31 - 1, -2])
def test_a_gate_row_that_does_not_exist_gives_nan_and_sets_the_flag(bad: int, kernels) -> None:
    call = cases.build(UPDATES["packed-gates"])
    call.arguments["gate_index"][1] = bad
    assert call.run("emulated").x.isnan().all()
    assert kernels.take_errors() == BAD_GATE and kernels.take_errors() == 0


@pytest.mark.parametrize("bad", [3, 2**31 - 1, -2])
@pytest.mark.parametrize("name", ["refresh", "float8-refresh"])
def test_a_fresh_row_that_does_not_exist_keeps_the_slot_and_sets_the_flag(
    name: str, bad: int, kernels
) -> None:
    call, kept = cases.build(FORMS[name]), cases.build(FORMS[name])
    call.arguments["fresh_slots"][1, 2], kept.arguments["fresh_slots"][1, 2] = bad, -1
    assert_same_bits(call.run("emulated"), kept.run("emulated"))
    assert_same_bits(call.arguments["slot"], kept.arguments["slot"])
    assert kernels.take_errors() == BAD_SLOT


@pytest.mark.parametrize("bad", [4, 2**31 - 1, -2])
def test_a_packed_row_that_does_not_exist_is_not_written_and_sets_the_flag(bad: int, kernels) -> None:
    call, kept = cases.build(UPDATES["packed-rows"]), cases.build(UPDATES["packed-rows"])
    call.arguments["row_slots"][0, 1], kept.arguments["row_slots"][0, 1] = bad, -1
    assert_same_bits(call.run("emulated"), kept.run("emulated"))
    assert kernels.take_errors() == BAD_SLOT


# --- arguments that the launcher refuses ------------------------------------------------------------


def test_rows_that_do_not_fit_into_registers_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="x: at most 8192 channels"):
        cases.build(Form(channels=8200, norm=Norm.LAYER)).run("emulated")
    verify(Form(channels=8200), "emulated")


def test_a_slot_that_shares_memory_with_an_input_is_refused_by_name() -> None:
    call = cases.build(SCATTERS["store"])
    with pytest.raises(RuntimeError, match="slot: is written in place and shares memory with x"):
        call.given(x=call.arguments["slot"]).run("emulated")


# --- the emulator itself ------------------------------------------------------------------------


@pytest.mark.full
def test_a_kernel_without_its_barriers_gives_wrong_values(monkeypatch) -> None:
    broken = emulated.build("emulated_without_barriers", "-DEMULATOR_WITHOUT_BARRIERS", "-O0")
    monkeypatch.setattr(cases.Call, "run", lambda call, name: broken.call(call))
    for seed in range(3):
        broken.seed(seed)
        with pytest.raises(AssertionError, match="h: .* elements off"):
            verify(Form(channels=3072, norm=Norm.LAYER, seed=seed), "emulated")
    verify(
        Form(channels=1152, norm=Norm.LAYER, x="bfloat16", feature="bfloat16"), "emulated"
    )  # a warp per row: needs none
