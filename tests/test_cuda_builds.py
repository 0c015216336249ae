"""CUDA kernels compiled for GPUs that are not here: no spills, few registers, 16-byte loads, and a library
that links.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from nvcc import MISSING, NVCC, Kernel, compiled, run
from processes import ROOT
from tiers import thinned

from fastcache.backends import library

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason=MISSING)]

# kernel, template arguments, most registers; aligned kernels read 16 bytes at once
BF16, FP32 = "Type::kBFloat16", "Type::kFloat32"
REPRESENTATIVE = {
    "sum bf16": ("sum_kernel", (BF16, "true", 8, 4, 64), 128),
    "sum bf16, two rows": ("sum_kernel", (BF16, "true", 8, 2, 64), 128),
    "sum bf16, few rows": ("sum_kernel", (BF16, "true", 8, 1, 64), 64),
    "sum bf16, other features": ("sum_kernel", (BF16, "false", 8, 4, 64), 128),
    "sum bf16, 1024 terms": ("sum_kernel", (BF16, "true", 8, 4, 1024), 128),
    "sum fp32": ("sum_kernel", (FP32, "true", 4, 4, 64), 128),
    "rows bf16 3072": ("row_kernel", (BF16, 128, 3, 8, 64), 128),
    "rows bf16 6144": ("row_kernel", (BF16, 256, 3, 8, 64), 128),
    "rows fp32 1536": ("row_kernel", (FP32, 128, 3, 4, 64), 128),
    "rows fp32 5120": ("row_kernel", (FP32, 256, 5, 4, 64), 128),
}
UNALIGNED = {"sum bf16, unaligned": ("sum_kernel", (BF16, "true", 1, 4, 64), 80)}
each_architecture = pytest.mark.parametrize(
    "architecture", thinned([80, 90, 100], [90]), indirect=True, ids="sm_{}".format
)


@dataclass(frozen=True)
class Architecture:
    number: int
    kernels: dict[str, Kernel]
    cubin: Path


@pytest.fixture(scope="module")
def architecture(request, tmp_path_factory) -> Architecture:
    """The representative kernels, compiled for one architecture."""
    number = request.param
    forms = REPRESENTATIVE | UNALIGNED
    made = [
        f"template __global__ void {name}<{', '.join(map(str, arguments))}>(const __grid_constant__"
        f" Parameters<{arguments[-1]}>);"
        for name, arguments, _ in forms.values()
    ]
    source = "\n".join(
        [
            '#include "fastcache/cuda/rows.cuh"',
            '#include "fastcache/cuda/sum.cuh"',
            "namespace fastcache::cuda {",
            *made,
            "}",
        ]
    )
    kernels, cubin = compiled(source, number, tmp_path_factory.mktemp("kernels"))
    assert len(kernels) == len(forms)
    return Architecture(number, {form: kernels[symbol(*forms[form][:2])] for form in forms}, cubin)


def symbol(name: str, arguments: tuple) -> str:
    """The mangled name of an instantiation."""
    types = {
        FP32: "LNS_4TypeE0E",
        "Type::kFloat16": "LNS_4TypeE1E",
        BF16: "LNS_4TypeE2E",
        "true": "Lb1E",
        "false": "Lb0E",
    }
    mangled = "".join(types.get(a, f"Li{a}E") for a in arguments)
    return f"_ZN9fastcache4cuda{len(name)}{name}I{mangled}EEvNS0_10ParametersIXT{len(arguments) - 2}_EEE"


@each_architecture
@pytest.mark.parametrize("form", REPRESENTATIVE | UNALIGNED)
def test_kernels_spill_nothing_and_leave_registers_for_full_memory_traffic(
    form: str, architecture: Architecture
) -> None:
    kernel = architecture.kernels[form]
    assert (kernel.stack, kernel.spilled) == (0, 0)
    assert kernel.registers <= (REPRESENTATIVE | UNALIGNED)[form][2]


@each_architecture
@pytest.mark.parametrize("form", REPRESENTATIVE)
def test_aligned_kernels_read_16_bytes_at_once(form: str, architecture: Architecture) -> None:
    loads = architecture.kernels[form].loads()
    assert loads[16] >= 2 * REPRESENTATIVE[form][1][2 if "rows" in form else 3], (
        loads
    )  # x and the feature, every piece of the tile


@each_architecture
def test_a_kernel_for_unaligned_tensors_reads_element_by_element(architecture: Architecture) -> None:
    assert set(architecture.kernels["sum bf16, unaligned"].loads()) <= {
        1,
        2,
        4,
        8,
    }  # 8: weights and indices come alone


@each_architecture
def test_loads_of_the_next_term_are_issued_before_this_one_is_added(architecture: Architecture) -> None:
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton") is not None:
        found = next(
            (
                str(path)
                for path in (
                    Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
                ).glob("cuobjdump")
            ),
            None,
        )
    if found is None:
        pytest.skip("cuobjdump is neither in PATH nor in an installed triton")
    told = subprocess.run(
        [found, "-sass", "-fun", symbol(*REPRESENTATIVE["sum bf16"][:2]), str(architecture.cubin)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{os.environ['PATH']}:{Path(found).parent}"},
    )
    assert told.returncode == 0, told.stderr
    order = re.findall(r"(LDG\.E\.EF\.128|FFMA)", told.stdout)
    before = order[: order.index("FFMA")]
    assert before.count("LDG.E.EF.128") == 8, "four rows of this term and four of the next"


@pytest.mark.full
def test_the_cuda_library_builds_and_links_against_any_pytorch(tmp_path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    cmake = (
        shutil.which("cmake", path=str(Path(sys.executable).parent))
        or shutil.which("cmake")
        or pytest.skip("cmake is not installed")
    )
    output = tmp_path / "package"
    # PTX, barely optimised where nvcc can: machine code of all kernels takes minutes, and what stands for
    # them is checked above
    flags = ["-DCMAKE_CUDA_FLAGS=--Ofast-compile=max"] if "--Ofast-compile" in run([NVCC, "--help"]) else []
    run(
        [
            cmake,
            "-S",
            ROOT,
            "-B",
            tmp_path / "build",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DFASTCACHE_CUDA=1",
            "-DFASTCACHE_CUDA_ARCHS=90-virtual",
            f"-DFASTCACHE_OUTPUT={output}",
            *flags,
        ]
    )
    run([cmake, "--build", tmp_path / "build", "--target", "fastcache_cuda", "--parallel", "2"])
    built = output / "lib" / "libfastcache_cuda.so"
    assert library.schema_digest().encode() in built.read_bytes()
    names = [
        line.split()[-1].split("@")[0] for line in run(["nm", "-D", "--undefined-only", built]).splitlines()
    ]
    assert "aoti_torch_get_current_cuda_stream" in names
    unstable = [name for name in names if re.match(r"_ZNK?(2at|3c10|5torch)|cuda[A-Z]", name)]
    assert not unstable, "cudart is linked statically, PyTorch through its stable interface"
    exported = {line.split()[-1] for line in run(["nm", "-D", "--defined-only", built]).splitlines()}
    assert {
        "fastcache_schema_digest",
        "fastcache_cuda_error_flag",
        "fastcache_cuda_tuning_version",
        "fastcache_cuda_configs",
        "fastcache_cuda_tune",
        "fastcache_cuda_untune",
    } <= exported
    assert not [name for name in exported if "9fastcache" in name], "kernels and launchers are hidden"
