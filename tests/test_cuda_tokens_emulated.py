"""Values of the CUDA kernels that score and choose tokens, on emulated thread blocks."""

from collections.abc import Callable

import emulated
import pytest
import torch
from test_cpp_tokens import OPTIONS, hostile_rows
from tiers import thinned

from fastcache.backends import eager

pytestmark = pytest.mark.slow  # the first one compiles the emulator
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAD_COUNT = 4


@pytest.fixture(scope="module")
def kernels() -> emulated.Emulated:
    return emulated.build()


@pytest.fixture(autouse=True)
def undamaged(kernels):
    """Nothing beside the outputs is written, and no test leaves the sticky flag set."""
    kernels.seed(0)
    yield
    assert kernels.library.emulator_damage() == 0
    assert kernels.take_errors() == 0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def verify_choice(
    kernels: emulated.Emulated,
    score: torch.Tensor,
    counts: torch.Tensor | None = None,
    capacity: int | None = None,
    **options: object,
) -> None:
    """The kernel writes exactly what the definition writes, to the last tie."""
    R, N = score.shape
    generator = torch.Generator().manual_seed(N)
    counts = (
        torch.randint(0, N + 1, (R,), generator=generator, dtype=torch.int32) if counts is None else counts
    )
    capacity = N + 3 if capacity is None else capacity
    age = torch.randint(0, 5, (R, N), generator=generator, dtype=torch.int32)
    found = []
    for run in (kernels.operators.select_tokens_, eager.select_tokens_):
        own = age.clone()
        found.append((*run(score, own, counts, capacity, **options), own))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# --- select_tokens_ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [72, 576])
@pytest.mark.parametrize("options", OPTIONS)
def test_hostile_keys_are_chosen_as_the_definition_chooses_them(options: str, N: int, kernels) -> None:
    verify_choice(kernels, hostile_rows(N), **OPTIONS[options])


@pytest.mark.parametrize("N", [1, 2, 31, 32, 33, 255, 256, 257])
def test_every_tail_of_a_row(N: int, kernels) -> None:
    verify_choice(kernels, hostile_rows(N), age_weight=0.1)


@pytest.mark.parametrize("N", thinned([2048, 2049, 9216, 9217], [2048, 2049]))
def test_rows_on_both_sides_of_what_fits_into_shared_memory(N: int, kernels) -> None:
    verify_choice(kernels, hostile_rows(N, seed=1)[[0, 5, 6, 7]], age_weight=0.0625)


@pytest.mark.full
def test_a_row_as_long_as_a_video(kernels) -> None:
    verify_choice(
        kernels,
        random(1, 23850).abs(),
        torch.tensor([3565], dtype=torch.int32),
        3565,
        age_weight=0.25 / 3,
        width=159,
        cell=3,
        bonus=0.4,
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_threads_run_changes_no_choice(seed: int, kernels) -> None:
    kernels.seed(seed + 1)
    verify_choice(kernels, hostile_rows(576, seed), **OPTIONS["all"])


def test_strided_scores_and_ages_are_read_as_they_are(kernels) -> None:
    score, counts = random(40, 3).t(), torch.tensor([2, 9, 40, 7], dtype=torch.int32)[::2][[0, 1, 1]][::1]
    ages = [torch.arange(240, dtype=torch.int32).view(3, 80)[:, ::2] for _ in range(2)]
    found, expected = (
        kernels.operators.select_tokens_(score, ages[0], counts, 40, 0.01),
        eager.select_tokens_(score, ages[1], counts, 40, 0.01),
    )
    assert all(torch.equal(a, b) for a, b in zip((*found, ages[0]), (*expected, ages[1]), strict=True))
    assert torch.equal(ages[0].storage_offset() + ages[0], ages[1])


@pytest.mark.parametrize(("count", "taken"), [(-1, 0), (-(2**31), 0), (6, 5), (2**31 - 1, 5)])
def test_a_count_out_of_range_is_clamped_and_sets_the_flag(count: int, taken: int, kernels) -> None:
    age = torch.zeros(1, 9, dtype=torch.int32)
    slots, index = kernels.operators.select_tokens_(
        random(1, 9), age, torch.tensor([count], dtype=torch.int32), 5
    )
    assert int((slots >= 0).sum()) == int((index >= 0).sum()) == int((age == 0).sum()) == taken
    assert kernels.take_errors() == BAD_COUNT and kernels.take_errors() == 0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs_give_empty_choices(shape: tuple[int, int], kernels) -> None:
    slots, index = kernels.operators.select_tokens_(
        torch.zeros(shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(shape[0], dtype=torch.int32), 2
    )
    assert slots.shape == shape and index.shape == (shape[0], 2) and (index == -1).all()


# --- scores ---------------------------------------------------------------------------------------------


def verify_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 8), (1, 3, 1), (2, 9, 111), (1, 4, 1152), (1, 2, 3072), (0, 3, 8), (2, 0, 8), (1, 2, 0)]
)
def test_row_scores_are_those_of_the_definition(dtype: torch.dtype, shape: tuple[int, ...], kernels) -> None:
    x = random(*shape, dtype=dtype)
    verify_close(kernels.operators.row_score(x), eager.row_score(x.double()))
    for other in DTYPES:
        reference = random(*shape, dtype=other, seed=1)
        verify_close(
            kernels.operators.row_score(x, reference), eager.row_score(x.double(), reference.double())
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 5, 16),
        (1, 1, 3, 1),
        (2, 3, 9, 72),
        (1, 16, 33, 64),
        (1, 5, 3, 264),
        (1, 40, 3, 8),
        (1, 7, 2, 31),
        (2, 4, 0, 16),
        (1, 0, 3, 16),
        (1, 2, 3, 0),
    ],
)
def test_value_norm_sums_over_heads(dtype: torch.dtype, shape: tuple[int, ...], kernels) -> None:
    v = random(*shape, dtype=dtype)
    verify_close(kernels.operators.value_norm(v), eager.value_norm(v.double()))


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("channels", [8, 12, 64])
def test_views_of_every_alignment(channels: int, offset: int, kernels) -> None:
    for dtype in DTYPES:
        wide = random(2, 9, 3, 4, channels + 8, dtype=dtype)[..., offset : offset + channels]
        _, k, v = wide.permute(2, 0, 3, 1, 4)
        verify_close(kernels.operators.value_norm(v), eager.value_norm(v.double()))
        x, y = v[:, 1], k[:, 2]
        verify_close(kernels.operators.row_score(x, y), eager.row_score(x.double(), y.double()))
        found = kernels.operators.relative_error([x, y], [y, x])
        verify_close(found, eager.relative_error([x.double(), y.double()], [y.double(), x.double()]))


def test_a_nan_stays_in_its_token(kernels) -> None:
    x = random(1, 6, 64)
    x[0, 2, 5] = float("nan")
    v = random(1, 3, 6, 16)
    v[0, 1, 4, 3] = float("nan")
    assert kernels.operators.row_score(x).isnan().nonzero().tolist() == [[0, 2]]
    assert kernels.operators.row_score(random(1, 6, 64, seed=1), x).isnan().nonzero().tolist() == [[0, 2]]
    assert kernels.operators.value_norm(v).isnan().nonzero().tolist() == [[0, 4]]


# --- relative_error -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "K"), [(1, 1), (5, 3), (2, 4), (2, 5), (1, 9), (3, 0)])
def test_relative_errors_are_those_of_the_definition(dtype: torch.dtype, L: int, K: int, kernels) -> None:
    newest, earlier = (
        [random(2, 7, 72, dtype=dtype, seed=100 * base + j) for j in range(count)]
        for base, count in ((1, L), (2, K * L))
    )
    found = kernels.operators.relative_error(newest, earlier)
    expected = eager.relative_error([t.double() for t in newest], [t.double() for t in earlier])
    assert found.shape == (K, L)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 1152), (2, 33, 1152)])
def test_features_of_one_block_and_of_several(shape: tuple[int, ...], kernels) -> None:
    newest, earlier = [random(*shape)], [random(*shape, seed=1), random(*shape, seed=2)]
    torch.testing.assert_close(
        kernels.operators.relative_error(newest, earlier),
        eager.relative_error(newest, earlier),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize(("L", "K"), [(64, 3), (65, 3), (600, 1), (1, 1024)])
def test_more_tensors_than_one_table_holds(L: int, K: int, kernels) -> None:
    newest, earlier = list(random(L, 1, 1, 8)), list(random(K * L, 1, 1, 8, seed=1))
    torch.testing.assert_close(
        kernels.operators.relative_error(newest, earlier),
        eager.relative_error(newest, earlier),
        rtol=1e-6,
        atol=0,
    )


def test_relative_error_of_nothing_is_defined(kernels) -> None:
    zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    found = kernels.operators.relative_error(
        [zero, zero, one], [one, zero, torch.full((1, 2, 4), float("nan"))]
    )
    assert found[0, 0].isinf() and found[0, 1].isnan() and found[0, 2].isnan()
    assert kernels.operators.relative_error([torch.zeros(1, 0, 4)], [torch.zeros(1, 0, 4)]).isnan().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda ops: ops.row_score(torch.zeros(2, 3)),
        lambda ops: ops.row_score(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)),
        lambda ops: ops.value_norm(torch.zeros(1, 2, 3)),
        lambda ops: ops.relative_error([torch.zeros(1, 2, 3)] * 2, [torch.zeros(1, 2, 3)]),
        lambda ops: ops.select_tokens_(
            torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 4
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable, kernels) -> None:
    with pytest.raises(RuntimeError, match="x:|reference:|v:|earlier|age:"):
        call(kernels.operators)


# --- the emulator itself --------------------------------------------------------------------------------


@pytest.mark.full
def test_kernels_without_their_barriers_give_wrong_values() -> None:
    broken = emulated.build("emulated_without_barriers", "-DEMULATOR_WITHOUT_BARRIERS", "-O0")
    for seed in range(3):
        broken.seed(seed)
        with pytest.raises((AssertionError, RuntimeError), match="different barriers|method equal"):
            verify_choice(broken, random(2, 4096, seed=seed))
        newest, earlier = [random(2, 33, 1152)], list(random(4, 2, 33, 1152, seed=1))
        found = broken.operators.relative_error(newest, earlier)
        assert not torch.allclose(found, eager.relative_error(newest, earlier), rtol=1e-6)
    x = random(1, 5, 72)
    verify_close(broken.operators.row_score(x), eager.row_score(x))  # a warp per row: needs none
    broken.library.emulator_damage()
