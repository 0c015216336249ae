"""Triton kernels compiled ahead of time for GPUs: wide loads, no spills, pipelined tiles."""

import os

import pytest
from tiers import thinned

pytest.importorskip("triton", reason="triton is not installed (extra `triton`)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled", allow_module_level=True)

import triton.language as tl
from ahead_of_time import compiled

from fastcache.backends.triton_config import SUM_CONFIGS, SumConfig, row_config, sum_config
from fastcache.kernels.residual_update import row_kernel, sum_kernel

SHARED = dict(
    D=1152,
    F=tl.bfloat16,
    FLOAT8=False,
    GATE=1,
    PACKED=True,
    WEIGHTED=False,
    SCALED=False,
    SLOT=False,
    MAPPED=False,
    WRITE=True,
    ALIGN=16,
    UNIT=8,
)
ROW = dict(
    SHARED,
    SLOT_FLOAT8=False,
    NORM=1,
    SHIFT=1,
    SCALE=1,
    NORM_WEIGHT=False,
    NORM_BIAS=False,
    ROW_SLOTS=False,
    REFERENCE=False,
    STAGES=1,
)
each_architecture = pytest.mark.parametrize("capability", thinned([80, 90, 100], [90]))
MAX_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@each_architecture
@pytest.mark.parametrize("config", SUM_CONFIGS, ids=str)
def test_the_trunk_sum_reads_features_16_bytes_wide_and_spills_nothing(
    config: SumConfig, capability: int
) -> None:
    build = compiled(
        sum_kernel,
        dict(SHARED, ROWS=config.rows, COLUMNS=config.columns, STAGES=config.stages),
        capability,
        config.warps,
    )
    assert (
        build.stack == build.local == 0 and build.registers <= 128 and build.shared <= MAX_SHARED[capability]
    )
    if config.stages > 1:
        assert build.async_copies()[16] >= config.stages - 1, build.async_copies()
    else:
        assert build.loads()[16] >= 2, build.loads()  # x and the feature


@each_architecture
@pytest.mark.parametrize("width", [1152, 1536, 3072, 4096, 5120, 6144, 8192, 1160])
def test_the_row_kernel_reads_every_tensor_16_bytes_wide_and_spills_nothing(
    width: int, capability: int
) -> None:
    config = row_config(width)
    build = compiled(row_kernel, dict(ROW, D=width, COLUMNS=config.columns), capability, config.warps)
    assert build.stack == build.local == 0 and build.registers <= 128
    assert build.loads()[2] == 0 and build.loads()[16] >= 5, build.loads()  # x, feature, gate, shift, scale


@each_architecture
def test_refresh_and_selected_rows_are_compiled_without_spills(capability: int) -> None:
    tile = compiled(
        sum_kernel, dict(SHARED, SLOT=True, MAPPED=True, ROWS=8, COLUMNS=128, STAGES=4), capability, 4
    )
    row = compiled(
        row_kernel,
        dict(ROW, SLOT=True, MAPPED=True, ROW_SLOTS=True, REFERENCE=True, COLUMNS=2048),
        capability,
        4,
    )
    for build in (tile, row):
        assert build.stack == build.local == 0 and build.registers <= 128


def test_a_misaligned_tensor_has_a_path_of_its_own() -> None:
    build = compiled(
        sum_kernel, dict(SHARED, ALIGN=1, UNIT=1, ROWS=8, COLUMNS=128, STAGES=1), 90, 4, aligned=False
    )
    assert build.loads()[16] == 0


@each_architecture
@pytest.mark.parametrize(
    ("feature", "float8"),
    [(tl.float32, False), (tl.float16, False), (tl.uint8, True)],
    ids=["fp32", "fp16", "fp8"],
)
def test_every_feature_type_compiles_on_every_architecture(feature, float8: bool, capability: int) -> None:
    config = sum_config(64, 256, 1152, 56, float8)
    build = compiled(
        sum_kernel,
        dict(
            SHARED,
            F=feature,
            FLOAT8=float8,
            SCALED=float8,
            ROWS=config.rows,
            COLUMNS=config.columns,
            STAGES=config.stages,
        ),
        capability,
        config.warps,
        tensor="fp32",
    )
    assert build.stack == build.local == 0


@pytest.mark.parametrize("width", [64, 1152, 1160, 3072, 8192])
@pytest.mark.parametrize("batch", [1, 2, 8, 64])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 56])
def test_the_heuristic_chooses_legal_tiles(terms: int, batch: int, width: int) -> None:
    assert (
        sum_config(batch, 256, width, terms) in SUM_CONFIGS
        and sum_config(batch, 256, width, terms, True) in SUM_CONFIGS
    )
    assert row_config(width).columns >= width


def test_an_illegal_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="8 elements a thread"):
        SumConfig(2, 128, 4, 1)
