"""The cpp kernels that score and choose tokens: every instruction set, every number of threads, hostile
keys.
"""

import pytest
import torch
from processes import succeeds
from test_instruction_sets import CPP, SETS, VARIABLE
from tiers import thinned
from torch import Tensor

import fastcache
from fastcache.backends import eager
from fastcache.ops import relative_error, row_score, select_tokens_, value_norm

pytestmark = pytest.mark.skipif(not CPP.available, reason=f"cpp: {CPP.reason}")


def hostile_rows(N: int, seed: int = 0) -> torch.Tensor:
    """Rows whose keys lie badly for bins: equal, subnormal, infinite, NaN, of both signs, next to each
    other.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(N, generator=generator)
    bits = torch.randint(-(2**31), 2**31 - 1, (N,), generator=generator, dtype=torch.int64).int()
    neighbours = (torch.randint(0, 3, (N,), generator=generator) + 0x3F800000).int()
    return torch.stack(
        [
            plain,
            plain.round(),
            torch.ones(N),
            plain * 1e-41,
            plain * 1e38,
            bits.view(torch.float32),
            neighbours.view(torch.float32),
            torch.where(plain > 1, float("nan"), plain),
            torch.where(plain > 1, float("inf"), -plain),
            torch.where(plain.abs() < 0.5, -0.0, 0.0),
            plain.exp().exp(),
        ]
    )


def verify_choice(score: torch.Tensor, **options: object) -> None:
    """The cpp backend writes exactly what the definition writes, to the last tie."""
    R, N = score.shape
    generator = torch.Generator().manual_seed(N)
    counts = torch.randint(0, N + 1, (R,), generator=generator, dtype=torch.int32)
    age = torch.randint(0, 5, (R, N), generator=generator, dtype=torch.int32)
    found = []
    for name in ("cpp", "eager"):
        own = age.clone()
        with fastcache.use_backend(name):
            found.append((*select_tokens_(score, own, counts, N + 3, **options), own))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


OPTIONS = {
    "plain": dict(normalize=False),
    "normalized": dict(),
    "aged": dict(age_weight=0.25 / 3, normalize=False),
    "all": dict(age_weight=0.0625, width=12, cell=2, bonus=0.6),
    "wide cells": dict(normalize=False, width=12, cell=3, bonus=-0.7),
}


@pytest.mark.parametrize("N", [72, 144, 576, 4176])
@pytest.mark.parametrize("options", OPTIONS)
def test_hostile_keys_are_chosen_as_the_definition_chooses_them(options: str, N: int) -> None:
    verify_choice(hostile_rows(N), **OPTIONS[options])


@pytest.mark.parametrize("N", [1, 2, 3, 15, 16, 17, 31, 33, 2047, 2049])
def test_every_tail_of_a_row(N: int) -> None:
    verify_choice(hostile_rows(N), age_weight=0.1)


def test_a_product_is_rounded_before_it_is_added() -> None:
    """Sums that a contracted multiply-add would round to another neighbour, so that it would choose other
    tokens.
    """
    score = (torch.randint(0, 64, (8, 4096), generator=torch.Generator().manual_seed(3)) * 2.0**-20).float()
    age = (
        torch.randint(0, 5, (8, 4096), generator=torch.Generator().manual_seed(4096), dtype=torch.int32)
        * 1001
    )
    counts = torch.full((8,), 1000, dtype=torch.int32)
    weight = torch.tensor(0.1)
    contracted = (score.double() + weight.double() * age.double()).float()
    own = age.clone()
    with fastcache.use_backend("cpp"):
        found = select_tokens_(score, own, counts, 1000, age_weight=0.1, normalize=False).slots
    assert torch.equal(found, eager.select_tokens_(score, age.clone(), counts, 1000, 0.1, False)[0])
    assert not torch.equal(found, eager.select_tokens_(contracted, age.clone(), counts, 1000, 0.0, False)[0])


@pytest.mark.parametrize("name", thinned(SETS, SETS[-1:]))
@pytest.mark.slow
def test_every_instruction_set_passes(name: str) -> None:
    succeeds(
        """
import sys, torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
import test_cpp_tokens as cpp, test_token_scores as scores
for options in cpp.OPTIONS.values():
    for N in (72, 144, 576):
        cpp.verify_choice(cpp.hostile_rows(N), **options)
cpp.test_a_product_is_rounded_before_it_is_added()
for N in (1, 15, 17, 33, 2049):
    cpp.test_every_tail_of_a_row(N)
for dtype in scores.DTYPES:
    for shape in ((2, 5, 8), (1, 3, 1), (2, 7, 111), (1, 4, 1152)):
        scores.test_row_scores_are_norms_and_cosines("cpp", dtype, shape)
    for shape in ((2, 4, 5, 16), (1, 1, 3, 1), (2, 3, 7, 72)):
        scores.test_value_norm_sums_over_heads("cpp", dtype, shape)
    for L, K in ((1, 1), (5, 3), (3, 6), (2, 0)):
        scores.test_relative_error_is_that_of_the_calibration("cpp", dtype, L, K)
scores.test_relative_error_of_nothing_is_defined("cpp")
""",
        **{VARIABLE: name},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    features = [make(2, 203, 777, seed=j) for j in range(8)]
    calls = {
        "row_score": lambda: row_score(features[0], features[1]),
        "value_norm": lambda: value_norm(make(2, 6, 1030, 40)),
        "relative_error": lambda: relative_error(features[:2], features[2:]),
        "select_tokens_": lambda: torch.cat(
            select_tokens_(
                hostile_rows(4096),
                torch.zeros(11, 4096, dtype=torch.int32),
                torch.full((11,), 999, dtype=torch.int32),
                999,
            ),
            1,
        ),
    }
    threads = torch.get_num_threads()
    try:
        for name, call in calls.items():
            torch.set_num_threads(1)
            with fastcache.use_backend("cpp"):
                alone = call()
                for count in (2, 3, 7):
                    torch.set_num_threads(count)
                    assert torch.equal(call(), alone), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5, 9])
def test_every_number_of_lookaheads_and_strided_features(K: int) -> None:
    wide = torch.randn(2 + 2 * K, 2, 21, 50, generator=torch.Generator().manual_seed(K))[..., 3:40]
    newest, earlier = list(wide[:2]), list(wide[2:])
    with fastcache.use_backend("cpp"):
        found = relative_error(newest, earlier)
    torch.testing.assert_close(found, eager.relative_error(newest, earlier), rtol=1e-6, atol=0)


def test_an_age_that_shares_memory_is_refused() -> None:
    counts = torch.ones(2, dtype=torch.int32)
    with fastcache.use_backend("cpp"):
        with pytest.raises(RuntimeError, match="age: its elements share memory"):
            select_tokens_(torch.rand(2, 4), torch.zeros(1, 4, dtype=torch.int32).expand(2, 4), counts, 1)
        with pytest.raises(RuntimeError, match="age: is written in place and shares memory"):
            select_tokens_(torch.rand(2, 1), counts[:, None], counts, 1)
