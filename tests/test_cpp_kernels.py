"""What only the compiled CPU kernels have: instruction sets, column tiles, thread counts, one owner per
packed row.
"""

from dataclasses import replace

import pytest
import torch
from cases import SCATTERS, UPDATES, Form, assert_same_bits, build, each_dtype, verify
from processes import succeeds
from test_instruction_sets import SETS, VARIABLE
from tiers import thinned

import fastcache
from fastcache.ops import Norm

CPU = fastcache.backends.LIBRARIES["cpu"]

pytestmark = pytest.mark.skipif(
    not CPU.loaded, reason=f"the compiled CPU kernels are not there: {CPU.reason}"
)


@pytest.mark.parametrize("name", thinned(SETS, SETS[-1:]))
@pytest.mark.slow
def test_errors_and_column_tiles_on_every_instruction_set(name):
    succeeds(
        """
import sys
sys.path.insert(0, "tests")
from dataclasses import replace
from cases import PRECISIONS, Form, verify
from fastcache.ops import Norm
import test_residual_update as update
for precision in PRECISIONS.values():
    whole = Form(terms=2, gate="BD", norm=Norm.LAYER, shift="BD", scale="BD")
    for form in (Form(terms=8, gate="BD", packed=True), whole):
        update.test_the_error_is_at_most_a_tenth_above_that_of_the_definition(form, precision, "cpp")
    for channels in (1281, 2561):
        form = Form(terms=3, gate="BND", norm=Norm.LAYER).of(precision)
        verify(replace(form, channels=channels, tokens=5), "cpp")
""",
        **{VARIABLE: name},
    )


@pytest.mark.parametrize("channels", [1279, 1280, 1281, 2559, 2561, 3900])
@pytest.mark.parametrize(
    "form",
    [
        Form(terms=1),
        Form(terms=3, gate="BD"),
        Form(terms=3, scales=True, gate="BND"),
        Form(terms=2, feature="bfloat16", norm=Norm.LAYER),
    ],
    ids=["one", "gated", "scaled", "widened"],
)
def test_rows_that_are_cut_into_column_tiles_have_no_seams(form, channels):
    verify(replace(form, channels=channels, tokens=5), "cpp")


@pytest.mark.parametrize("channels", [1, 3, 7, 9, 15, 17, 31, 33, 47, 63, 65])
@pytest.mark.parametrize(
    "form", [UPDATES["all"], UPDATES["float8"], SCATTERS["refresh-all"]], ids=["all", "float8", "scatter"]
)
def test_every_tail_of_a_vector(form, channels):
    for name in ("bfloat16", "float16", "float32"):
        feature = form.feature if form.feature.startswith("float8") else name
        verify(replace(form, channels=channels, x=name, feature=feature, vector=name, fresh=name), "cpp")


@each_dtype
@pytest.mark.parametrize(
    "form",
    [
        Form(terms=5, gate="BD", norm=Norm.LAYER, shift="BD", scale="BD", reference=True),
        Form(terms=2, slot="float32", fresh_rows=9, norm=Norm.RMS, rows=40, reference=True),
    ],
    ids=["update", "scatter"],
)
def test_results_do_not_depend_on_the_number_of_threads(form, dtype):
    name = str(dtype).removeprefix("torch.")
    form = replace(
        form, x=name, feature=name, vector=name, slot=form.slot and name, fresh=name, tokens=203, channels=777
    )
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
