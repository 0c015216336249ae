"""Every form of both operators in Triton's interpreter, against the definition in float64."""

import pytest
import torch
from cases import FORMS, LAYOUTS, PRECISIONS, VECTOR_SHAPES, Form, verify
from tiers import thinned

import fastcache
from fastcache.backends import take_index_errors, triton as backend
from fastcache.ops import Norm

# the interpreter truncates fp32 -> bf16 instead of rounding: fp32 and fp16 are exact tests of values
EXACT = {name: PRECISIONS[name] for name in ("fp32", "fp16")}


@pytest.mark.parametrize("precision", thinned(EXACT.values(), [EXACT["fp32"]]), ids=EXACT)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_lie_within_the_rounding_bounds(form: Form, precision) -> None:
    verify(form.of(precision), "triton")


@pytest.mark.parametrize("layout", thinned(LAYOUTS, list(LAYOUTS)[::2]))
@pytest.mark.parametrize("name", ["packed-gates", "modulated", "all", "refresh-between", "refresh-all"])
def test_strided_values_lie_within_the_rounding_bounds(name: str, layout: str) -> None:
    from dataclasses import replace

    verify(replace(FORMS[name], layout=layout), "triton")


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("channels", thinned([1, 7, 8, 72, 136, 260], [7, 72, 136]))
def test_any_alignment_and_number_of_channels(channels: int, offset: int) -> None:
    verify(
        Form(
            terms=3,
            gate="BD",
            packed=True,
            channels=channels,
            offset=offset,
            norm=Norm.LAYER,
            shift="BD",
            scale="BD",
        ),
        "triton",
    )
    verify(Form(terms=3, gate="BD", packed=True, channels=channels, offset=offset), "triton")


@pytest.mark.parametrize("shape", VECTOR_SHAPES)
def test_gates_shifts_and_scales_of_every_shape(shape: str) -> None:
    verify(Form(terms=2, gate=shape, norm=Norm.LAYER, shift=shape, scale=shape), "triton")
    verify(Form(terms=2, gate=shape, packed=True), "triton")


def test_an_index_out_of_range_sets_the_flag_and_writes_nothing_outside() -> None:
    x, feature, gates = torch.randn(1, 4, 8), torch.randn(1, 4, 8), torch.randn(2, 1, 8)
    flag = backend.error_flag(x.device)
    flag.zero_()
    with pytest.raises(IndexError):  # on a CPU the check comes first; a GPU has the flag alone
        backend.residual_update(x, [feature], gates, torch.tensor([2], dtype=torch.int32))
    launch = backend._launch
    for bad in (2, 7, 2**31 - 1, -2):  # a gate that does not exist is NaN, as in CUDA
        out = launch(
            x,
            [feature],
            1,
            None,
            None,
            None,
            None,
            gates,
            torch.tensor([bad], dtype=torch.int32),
            None,
            None,
            0,
            None,
            None,
            None,
            None,
            1e-6,
            None,
            0,
            None,
            True,
        )[0]
        assert out.isnan().all() and take_index_errors(x.device) == "gate_index" and int(flag) == 0
    slots = torch.tensor([[0, 9, -1, 1]], dtype=torch.int32)
    slot, fresh = torch.zeros(1, 4, 8), torch.ones(1, 2, 8)
    launch(
        x,
        [],
        0,
        slot,
        fresh,
        slots,
        None,
        None,
        None,
        None,
        None,
        0,
        None,
        None,
        None,
        None,
        1e-6,
        None,
        0,
        None,
        True,
    )
    assert int(flag) == 2 and slot.sum(-1).tolist() == [[8, 0, 0, 8]]
    assert take_index_errors(x.device) == "fresh_slots or row_slots"


@pytest.mark.parametrize("norm", [Norm.NONE, Norm.IDENTITY], ids=["sum", "rows"])
@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 1, 8), (2**31, 8, 1)), ((1, 2, 8), (8, 2**31, 1))], ids=["batch", "token"]
)
def test_strides_beyond_two_to_the_31_elements(
    shape: tuple[int, ...], strides: tuple[int, ...], norm: Norm
) -> None:
    x = torch.empty(2**31 + 8, dtype=torch.float16).as_strided(
        shape, strides
    )  # pages that are not touched take no memory
    x.copy_(torch.randn(shape))
    with fastcache.use_backend("triton"):
        assert torch.equal(fastcache.ops.residual_update(x, x, norm=norm).x, (x + x).contiguous())


def test_the_backend_can_be_forced_on_a_cpu_and_is_never_chosen_by_itself() -> None:
    x = torch.randn(1, 4, 8)
    assert fastcache.backends.chosen_name(x.device) in ("cpp", "eager")
    with fastcache.use_backend("triton"):
        assert torch.equal(fastcache.ops.residual_update(x, x).x, 2 * x)
