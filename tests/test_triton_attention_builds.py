"""attention_received compiled ahead of time for GPUs: tensor cores, 16-byte loads, no spills; and its
configurations.
"""

import os
import re

import pytest
import torch
from tiers import thinned

pytest.importorskip("triton", reason="triton is not installed (extra `triton`)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled", allow_module_level=True)

from ahead_of_time import Build, compiled

from fastcache.backends.triton_config import (
    ATTENTION_CONFIGS,
    EXACT_ATTENTION,
    NARROW_ATTENTION,
    WIDE_ATTENTION,
    AttentionConfig,
    attention_config,
    head_split,
)
from fastcache.kernels.attention_received import lse_kernel, received_kernel

each_architecture = pytest.mark.parametrize("capability", thinned([80, 90, 100], [90]))
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma|wgmma\.mma_async|mma\.sync"}


def built(
    d: int,
    config: AttentionConfig,
    capability: int,
    dtype: str = "bf16",
    sums: bool = False,
    aligned: bool = True,
) -> Build:
    """received_kernel, or with `sums` lse_kernel, whose tile has its sides exchanged."""
    head, tail = head_split(d)
    keys, queries = (config.queries, config.keys) if sums else (config.keys, config.queries)
    constants = dict(
        D=d,
        HEAD=head,
        TAIL=tail,
        PRECISION="ieee",
        ALIGN=16 if aligned else 1,
        UNIT=8 if aligned else 1,
        KEYS=keys,
        QUERIES=queries,
        STAGES=config.stages,
    )
    return compiled(
        lse_kernel if sums else received_kernel,
        constants,
        capability,
        config.warps,
        tensor=dtype,
        aligned=aligned,
    )


@each_architecture
@pytest.mark.parametrize("config", [NARROW_ATTENTION, WIDE_ATTENTION], ids=["narrow", "wide"])
@pytest.mark.parametrize("d", [64, 72, 128])
@pytest.mark.slow
def test_16_bit_heads_run_on_tensor_cores_without_spills(
    d: int, config: AttentionConfig, capability: int
) -> None:
    for sums in (False, True):
        build = built(d, config, capability, sums=sums)
        assert build.stack == build.local == 0 and build.registers <= 192
        assert re.search(TENSOR_CORES[capability], build.ptx)
        assert build.loads()[16] >= 1 and build.loads()[2] == 0, build.loads()  # the tile that stays
        copies = build.async_copies()
        assert copies[16] >= config.stages - 1 and copies[2] == 0, (
            copies
        )  # the tiles of the loop, whole or but for the tail


@each_architecture
def test_float16_takes_the_same_path_as_bfloat16(capability: int) -> None:
    build = built(72, NARROW_ATTENTION, capability, dtype="fp16")
    assert build.stack == build.local == 0 and re.search(TENSOR_CORES[capability], build.ptx)


@each_architecture
@pytest.mark.parametrize("d", [72, 128])
@pytest.mark.slow
def test_float32_is_multiplied_in_float32_and_never_in_tf32(d: int, capability: int) -> None:
    for sums in (False, True):
        build = built(d, EXACT_ATTENTION, capability, dtype="fp32", sums=sums)
        assert build.stack == build.local == 0 and build.registers <= 128
        assert not re.search(r"tf32|mma", build.ptx) and "fma.rn.f32" in build.ptx


def test_misaligned_tensors_have_a_path_of_their_own() -> None:
    assert built(72, NARROW_ATTENTION, 90, aligned=False).loads()[16] == 0


def test_tf32_would_be_seen() -> None:
    """The lint above can fail."""
    head, tail = head_split(64)
    build = compiled(
        received_kernel,
        dict(D=64, HEAD=head, TAIL=tail, PRECISION="tf32", ALIGN=16, UNIT=8, KEYS=64, QUERIES=16, STAGES=2),
        80,
        4,
        tensor="fp32",
    )
    assert "tf32" in build.ptx


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (65, (64, 16)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (97, (128, 0)),
        (128, (128, 0)),
        (136, (128, 16)),
    ],
)
def test_a_head_is_cut_into_powers_of_two_that_hold_it(d: int, expected: tuple[int, int]) -> None:
    assert head_split(d) == expected


@pytest.mark.parametrize("d", range(1, 300))
def test_every_head_is_held_by_its_parts(d: int) -> None:
    head, tail = head_split(d)
    assert d <= head + tail < 2 * max(16, d) and all(
        part == 0 or (part >= 16 and part & (part - 1) == 0) for part in (head, tail)
    )


@pytest.mark.parametrize("M", [1, 256, 1024, 75600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_heuristic_chooses_legal_tiles(dtype: torch.dtype, M: int) -> None:
    assert attention_config(dtype, 72, M) in ATTENTION_CONFIGS


def test_an_illegal_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="16 keys a warp"):
        AttentionConfig(32, 64, 4, 3)
