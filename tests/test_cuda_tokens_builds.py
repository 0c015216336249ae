"""CUDA kernels that score and choose tokens, compiled for GPUs that are not here: no spills, 16-byte
loads.
"""

import pytest
from nvcc import MISSING, NVCC, Kernel, compiled
from tiers import thinned

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason=MISSING)]

BF16, FP32 = "Type::kBFloat16", "Type::kFloat32"
# kernel with its template arguments, its parameter, most registers, fewest 16-byte loads
FORMS = {
    "select, short rows": ("select_kernel<256, 2048>", "Selection", 64, 0),
    "select, shared memory": ("select_kernel<1024, 9216>", "Selection", 64, 0),
    "select, long rows": ("select_kernel<1024, 0>", "Selection", 64, 0),
    "row_score bf16": (
        f"row_score_kernel<{BF16}, 8>",
        "Scores",
        64,
        4 + 2 * 4,
    ),  # of x alone, and of x and a reference of 16 bits
    "row_score fp32": (f"row_score_kernel<{FP32}, 4>", "Scores", 64, 4 + 2 * 4),
    "value_norm bf16": (f"value_norm_kernel<{BF16}, 8>", "Scores", 64, 4),
    "value_norm fp32": (f"value_norm_kernel<{FP32}, 4>", "Scores", 64, 4),
    "relative_error bf16": (f"relative_error_kernel<{BF16}, 8, 256>", "Comparisons<256>", 80, 10),
    "relative_error fp32": (f"relative_error_kernel<{FP32}, 4, 256>", "Comparisons<256>", 80, 10),
    "relative_error bf16, many": (f"relative_error_kernel<{BF16}, 8, 1088>", "Comparisons<1088>", 80, 10),
}
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module", params=thinned([80, 90, 100], [90]), ids="sm_{}".format)
def kernels(request, tmp_path_factory) -> dict[str, Kernel]:
    """Every form, compiled for one architecture."""
    made = [
        f"template __global__ void {name}(const __grid_constant__ {parameter});"
        for name, parameter, *_ in FORMS.values()
    ]
    headers = [
        f'#include "fastcache/cuda/{name}.cuh"' for name in ("select_tokens", "row_score", "relative_error")
    ]
    found, _ = compiled(
        "\n".join([*headers, "namespace fastcache::cuda {", *made, "}"]),
        request.param,
        tmp_path_factory.mktemp("kernels"),
    )
    finish = [name for name in found if "relative_error_finish_kernel" in name]
    assert len(found) == len(FORMS) + len(finish) == len(FORMS) + 1
    return {
        form: next(kernel for name, kernel in found.items() if is_instance(name, FORMS[form][0]))
        for form in FORMS
    }


def is_instance(symbol: str, template: str) -> bool:
    """Whether a mangled name is that of a kernel with its template arguments."""
    name, _, arguments = template.removesuffix(">").partition("<")
    codes = {BF16: "LNS_4TypeE2E", FP32: "LNS_4TypeE0E"}
    return f"{len(name)}{name}I{''.join(codes.get(a, f'Li{a}E') for a in arguments.split(', '))}E" in symbol


@each_form
def test_kernels_spill_nothing(form: str, kernels: dict[str, Kernel]) -> None:
    kernel = kernels[form]
    assert (kernel.stack, kernel.spilled) == (0, 0)
    assert kernel.registers <= FORMS[form][2]


@each_form
def test_aligned_tensors_are_read_16_bytes_at_once(form: str, kernels: dict[str, Kernel]) -> None:
    assert kernels[form].loads()[16] >= FORMS[form][3], kernels[form].loads()


def test_keys_of_a_row_that_fits_are_never_read_from_global_memory(kernels: dict[str, Kernel]) -> None:
    """Beside counts, score (twice: the norm) and age (twice: it is also written), nothing is read."""
    assert sum(kernels["select, shared memory"].loads().values()) < sum(
        kernels["select, long rows"].loads().values()
    )
    assert (
        "atom.shared" in kernels["select, shared memory"].ptx
        or "red.shared" in kernels["select, shared memory"].ptx
    )
