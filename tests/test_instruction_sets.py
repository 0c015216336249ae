"""The cpp backend once more with each set of kernels that this processor can run."""

import ctypes
import os

import pytest
from processes import run_python, succeeds
from tiers import thinned

import fastcache
from fastcache.backends import library

CPP = fastcache.backends_status()["cpp"]
pytestmark = pytest.mark.skipif(not CPP.available, reason=f"cpp: {CPP.reason}")
VARIABLE = "FASTCACHE_CPU_CAPABILITY"
LOADED = "import torch, fastcache; x = torch.ones(1, 2, 4); fastcache.ops.residual_update(x, [x])"


def sets_usable_here() -> list[str]:
    """The instruction sets named by the error about one that does not exist."""
    if not CPP.available:
        return []
    error = run_python(LOADED, **{VARIABLE: "none"}).stderr
    named = error.rpartition("expected one of ")[2].partition(" on this processor")[0]
    return named.split(", ")


SETS = sets_usable_here()


def test_the_widest_set_is_chosen_unasked() -> None:
    capability = ctypes.CDLL(str(library.PACKAGE / "lib" / "libfastcache_cpu.so")).fastcache_cpu_capability
    capability.restype = ctypes.c_char_p
    assert capability().decode() == os.environ.get(VARIABLE, SETS[0])
    assert SETS[-1] == "default"


@pytest.mark.slow
def test_an_unknown_set_is_refused_by_name() -> None:
    error = run_python(LOADED, **{VARIABLE: "sse9"}).stderr
    assert "FASTCACHE_CPU_CAPABILITY: expected one of" in error and "got sse9" in error


@pytest.mark.parametrize("name", thinned(SETS, SETS[-1:]))
@pytest.mark.slow
def test_values_lie_within_the_rounding_bounds_and_no_byte_around_is_touched(name: str) -> None:
    succeeds(
        """
import sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
from dataclasses import replace
from cases import FORMS, LAYOUTS, PRECISIONS, verify
import test_residual_update as update, test_residual_update_scatter as scatter
for k, form in enumerate(FORMS.values()):
    for i, precision in enumerate(PRECISIONS.values()):
        verify(form.of(precision), "cpp")
        layout = LAYOUTS[(k + i) % len(LAYOUTS)]
        channels = 1 + (7 * k + 5 * i) % 40
        verify(replace(form.of(precision), channels=channels, layout=layout, offset=(k + i) % 11), "cpp")
    for channels in (111, 1160):
        verify(replace(form, channels=channels), "cpp")
for target in (torch.float16, torch.bfloat16):
    update.test_rounding_is_to_nearest_even_for_any_pattern_of_bits(target, "cpp")
for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
    update.test_every_narrow_number_is_widened_exactly(dtype, "cpp")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    update.test_sums_beyond_the_largest_number_round_to_infinity_and_not_before(dtype, "cpp")
    update.test_subnormal_numbers_are_not_flushed_to_zero(dtype, "cpp")
    update.test_negative_zero_is_kept_and_only_opposite_zeros_give_positive_zero(dtype, "cpp")
    for channel in update.PLACES:
        special = update.test_a_special_value_stays_in_its_element_of_the_sum_and_in_its_row_of_h
        special("features[2]", channel, float("nan"), dtype, "cpp")
for slot in scatter.SLOTS[1:]:
    scatter.test_the_store_rounds_any_pattern_of_bits_as_pytorch_does(slot, "cpp")
for channel in update.PLACES:
    special = scatter.test_a_special_value_in_a_float8_row_is_stored_as_the_definition_does
    special(channel, float("nan"), "cpp")
""",
        **{VARIABLE: name},
    )
