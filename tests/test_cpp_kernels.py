"""What only the compiled CPU kernels have: instruction sets, column tiles, thread counts, one owner per packed row."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastcache
from cases import SCATTERS, UPDATES, Form, assert_same_bits, build, each_dtype, verify
from fastcache.backends import library
from fastcache.ops import Norm
from processes import fails, succeeds

TESTS = Path(__file__).resolve().parent
CPU = fastcache.backends.LIBRARIES["cpu"]
CAPABILITIES = ("avx512", "avx2", "default")
# Together they walk every branch of the kernels: all forms, errors, conversions, tails, tiles.
ESSENTIAL = ("values_lie_within", "at_most_a_tenth", "pattern_of_bits", "widened_exactly", "special_value_in_a_float8", "no_seams", "every_tail")

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=f"the compiled CPU kernels are not there: {CPU.reason}")


def runs_here(capability: str) -> bool:
    """Whether this build and this processor have the instruction set."""
    return run_of(capability, "import torch, fastcache; fastcache.ops.residual_update(torch.zeros(1, 1, 1), [])").returncode == 0


def run_of(capability: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FASTCACHE_CPU_CAPABILITY": capability, "FASTCACHE_BACKEND": "cpp"}
    return subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", [name for name in CAPABILITIES if CPU.loaded and name != library.cpu_capability(CPU)])
def test_the_operators_are_right_on_every_other_instruction_set(capability):
    if not runs_here(capability):
        pytest.skip(f"this processor or this build has no {capability}")
    files = [str(TESTS / name) for name in ("test_residual_update.py", "test_residual_update_scatter.py", "test_cpp_kernels.py")]
    selected = f"not eager and not strided and ({' or '.join(ESSENTIAL)})"
    environment = os.environ | {"FASTCACHE_CPU_CAPABILITY": capability}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", selected, *files], cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_an_instruction_set_can_be_forced_and_is_reported():
    code = "import fastcache; from fastcache.backends import library; print(library.cpu_capability(fastcache.backends.LIBRARIES['cpu']))"
    assert succeeds(code, FASTCACHE_CPU_CAPABILITY="default").strip() == "default"


def test_an_unknown_instruction_set_is_an_error_that_lists_the_usable_ones():
    error = fails("import torch, fastcache; fastcache.ops.residual_update(torch.zeros(1, 1, 1), [])", FASTCACHE_CPU_CAPABILITY="mmx")
    assert "FASTCACHE_CPU_CAPABILITY: expected one of" in error and "default" in error and "mmx" in error


@pytest.mark.parametrize("channels", [1279, 1280, 1281, 2559, 2561, 3900])
@pytest.mark.parametrize("form", [Form(terms=1), Form(terms=3, gate="BD"), Form(terms=3, scales=True, gate="BND"), Form(terms=2, feature="bfloat16", norm=Norm.LAYER)], ids=["one", "gated", "scaled", "widened"])
def test_rows_that_are_cut_into_column_tiles_have_no_seams(form, channels):
    verify(replace(form, channels=channels, tokens=5), "cpp")


@pytest.mark.parametrize("channels", [1, 3, 7, 9, 15, 17, 31, 33, 47, 63, 65])
@pytest.mark.parametrize("form", [UPDATES["all"], UPDATES["float8"], SCATTERS["refresh-all"]], ids=["all", "float8", "scatter"])
def test_every_tail_of_a_vector(form, channels):
    for name in ("bfloat16", "float16", "float32"):
        feature = form.feature if form.feature.startswith("float8") else name
        verify(replace(form, channels=channels, x=name, feature=feature, vector=name, fresh=name), "cpp")


@each_dtype
@pytest.mark.parametrize("form", [Form(terms=5, gate="BD", norm=Norm.LAYER, shift="BD", scale="BD", reference=True), Form(terms=2, slot="float32", fresh_rows=9, norm=Norm.RMS, rows=40, reference=True)], ids=["update", "scatter"])
def test_results_do_not_depend_on_the_number_of_threads(form, dtype):
    name = str(dtype).removeprefix("torch.")
    form = replace(form, x=name, feature=name, vector=name, slot=form.slot and name, fresh=name, tokens=203, channels=777)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = build(form).run("cpp")
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert_same_bits(build(form).run("cpp"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_of_tokens_that_name_one_packed_row_the_last_takes_it(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(1, 512, 256)
        slots = torch.full((1, 512), -1, dtype=torch.int32)
        slots[0, [3, 200, 511]] = 0
        with fastcache.use_backend("cpp"):
            h = fastcache.ops.residual_update(x, [], norm=Norm.IDENTITY, row_slots=slots, row_count=2).h
    finally:
        torch.set_num_threads(before)
    assert torch.equal(h[0, 0], x[0, 511])
    assert not h[0, 1].any()
