"""Every form of both operators on a GPU against the definition in float64, and the backends against each
other.
"""

from dataclasses import replace

import cases
import pytest
import torch
from cases import (
    FORMS,
    LAYOUTS,
    PRECISIONS,
    SCATTERS,
    UPDATES,
    VECTOR_SHAPES,
    Form,
    assert_within,
    each_form,
    exact_update,
    sum_bound,
)
from on_device import KERNELS, available, build, each_kernel_backend, verify

from fastcache import backends
from fastcache.backends import selfcheck
from fastcache.ops import Norm

ALL, SCATTERED = UPDATES["all"], SCATTERS["refresh-all"]


@each_form
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_values_lie_within_the_rounding_bounds(form: Form, precision: str, device: torch.device) -> None:
    verify(form.of(PRECISIONS[precision]), "cuda", device)


@each_form
def test_triton_values_lie_within_the_rounding_bounds(form: Form, device: torch.device) -> None:
    verify(form.of(PRECISIONS["bf16"]), "triton", device)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "autocast", "fp32-vectors"])
@pytest.mark.parametrize(
    "form", [ALL, SCATTERED, SCATTERS["float8-refresh"]], ids=["all", "refresh-all", "float8"]
)
def test_triton_values_in_other_dtypes(form: Form, precision: str, device: torch.device) -> None:
    verify(form.of(PRECISIONS[precision]), "triton", device)


@pytest.mark.parametrize("form", [ALL, SCATTERED], ids=["all", "refresh-all"])
def test_the_definition_on_a_gpu_lies_within_the_bounds_too(form: Form, device: torch.device) -> None:
    verify(form.of(PRECISIONS["bf16"]), "eager", device)


@each_kernel_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["packed-gates", "refresh-all"])
def test_strided_values(name: str, layout: str, backend: str, device: torch.device) -> None:
    verify(replace(FORMS[name].of(PRECISIONS["bf16"]), layout=layout), backend, device)


@each_kernel_backend
@pytest.mark.parametrize("shape", VECTOR_SHAPES)
def test_vectors_of_every_shape(shape: str, backend: str, device: torch.device) -> None:
    verify(
        Form(
            terms=2, gate=shape, packed=True, norm=Norm.LAYER, shift=shape, scale=shape, vector_layout="chunk"
        ).of(PRECISIONS["bf16"]),
        backend,
        device,
    )


@each_kernel_backend
@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("channels", [1, 7, 72, 1152])
def test_every_alignment_and_tail(channels: int, offset: int, backend: str, device: torch.device) -> None:
    for form in (UPDATES["gated"], ALL):
        verify(
            replace(form.of(PRECISIONS["bf16"]), channels=channels, offset=offset, tokens=5), backend, device
        )


@each_kernel_backend
@pytest.mark.parametrize("channels", [1152, 1536, 3072, 4096, 5120, 6144, 8192])
def test_rows_of_every_width_in_the_table(channels: int, backend: str, device: torch.device) -> None:
    verify(replace(ALL.of(PRECISIONS["bf16"]), channels=channels, tokens=67), backend, device)


@each_kernel_backend
@pytest.mark.parametrize("terms", [0, 1, 64, 65, 1024])
def test_any_number_of_terms(terms: int, backend: str, device: torch.device) -> None:
    verify(
        replace(UPDATES["packed-gates"].of(PRECISIONS["bf16"]), terms=terms, tokens=9, channels=64),
        backend,
        device,
    )
    verify(
        replace(UPDATES["modulated"].of(PRECISIONS["bf16"]), terms=terms, tokens=9, channels=64),
        backend,
        device,
    )


@each_kernel_backend
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0), (1, 1), (3, 256)])
def test_any_batch_and_any_number_of_tokens_also_none(
    batch: int, tokens: int, backend: str, device: torch.device
) -> None:
    for name in ("sum", "modulated", "packed-rows", "store"):
        verify(replace(FORMS[name], batch=batch, tokens=tokens), backend, device)


@pytest.mark.parametrize("name", ["packed-gates", "weighted-gates", "gated-per-token", "float8"])
def test_cuda_triton_and_eager_agree_within_the_roundings_of_two_results(
    name: str, device: torch.device
) -> None:
    form = replace(FORMS[name].of(PRECISIONS["bf16"]), tokens=64, channels=1152)
    call = build(form, device)
    exact, magnitude = exact_update(call)
    bound = 2 * sum_bound(exact, magnitude, len(call.terms_exact()), torch.bfloat16)
    results = {backend: call.run(available(backend)).x for backend in (*KERNELS, "eager")}
    for backend, found in results.items():
        assert_within(found, results["eager"].double(), bound, backend)


@each_kernel_backend
@pytest.mark.parametrize("form", [ALL, SCATTERED], ids=["all", "refresh-all"])
def test_equal_inputs_give_equal_bits_whatever_else_the_gpu_does(
    form: Form, backend: str, device: torch.device, gpu_alone: None
) -> None:
    backend = available(backend)
    form = replace(form.of(PRECISIONS["bf16"]), tokens=256, channels=1152)
    expected, noise, side = (
        build(form, device).run(backend),
        torch.randn(2048, 2048, device=device),
        torch.cuda.Stream(),
    )
    for _ in range(20):
        call = build(form, device)
        with torch.cuda.stream(side):
            noise = noise @ noise * 1e-3
        cases.assert_same_bits(call.run(backend), expected)


@each_kernel_backend
def test_a_backend_proves_itself_on_this_gpu(backend: str, device: torch.device) -> None:
    module = backends._module(available(backend))
    assert {
        operator: selfcheck.disagreement(module, device, operator)
        for operator in backends.IMPLEMENTS[backend]
    } == dict.fromkeys(backends.IMPLEMENTS[backend], "")


def test_the_first_available_backend_is_the_one_that_is_chosen(device: torch.device, gpu_alone: None) -> None:
    first = next(name for name in backends.ORDER["cuda"] if backends.status()[name].available)
    assert backends.chosen_name(device, torch.bfloat16) == first


def test_the_operator_compiles_as_one_graph_and_agrees(device: torch.device, gpu_alone: None) -> None:
    from fastcache.ops import residual_update

    x, feature, gate = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in ((2, 64, 256), (2, 64, 256), (2, 256))
    )
    compiled = torch.compile(
        lambda x, feature, gate: residual_update(x * 2, feature, gate).x + 1, fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, feature, gate), residual_update(x * 2, feature, gate).x + 1)
