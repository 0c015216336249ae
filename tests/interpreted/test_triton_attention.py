"""attention_received in Triton's interpreter, against the map in float64."""

import pytest
import torch
from tiers import thinned

import fastcache
from fastcache.backends import triton as backend
from fastcache.ops import attention_received

# the interpreter truncates fp32 -> bf16 and multiplies bf16 by no rule of the hardware: fp32 and fp16 are
# tests of values
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float16: 2e-5,
}  # inputs are what they are; sums and products are float32
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logits_of(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    return q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)


def verify(q: torch.Tensor, k: torch.Tensor, scale: float | None = None, tolerance: float = 0.0) -> None:
    """With and without the log-sum-exp, the column sums of the materialised map."""
    logits = logits_of(q, k, scale)
    expected = logits.softmax(-1).mean(1).sum(1)
    for lse in (logits.logsumexp(-1).float(), None):
        found = backend.attention_received(q, k, lse, scale)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found.double(),
            expected,
            rtol=tolerance or TOLERANCE[q.dtype],
            atol=tolerance or TOLERANCE[q.dtype],
        )


@each_dtype
@pytest.mark.parametrize("d", thinned([16, 32, 64, 72, 80, 96, 128], [64, 72]))
def test_heads_of_every_width_in_use(d: int, dtype: torch.dtype) -> None:
    verify(random(2, 3, 70, d, dtype=dtype), random(2, 3, 70, d, dtype=dtype, seed=1))


@each_dtype
@pytest.mark.parametrize("d", [1, 7, 8, 24, 40, 65, 100])
def test_heads_of_any_other_width(d: int, dtype: torch.dtype) -> None:
    verify(random(1, 2, 17, d, dtype=dtype), random(1, 2, 19, d, dtype=dtype, seed=1))


@each_dtype
@pytest.mark.parametrize(
    ("N", "M"), [(1, 1), (1, 130), (130, 1), (16, 64), (64, 16), (63, 65), (5, 300), (300, 77)]
)
def test_any_number_of_queries_and_keys(N: int, M: int, dtype: torch.dtype) -> None:
    verify(random(1, 2, N, 16, dtype=dtype), random(1, 2, M, 16, dtype=dtype, seed=1))


def test_wide_tiles_give_the_same_sums() -> None:
    verify(random(1, 1, 70, 16, dtype=torch.float16), random(1, 1, 1100, 16, dtype=torch.float16, seed=1))


@each_dtype
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_views_of_a_packed_projection_are_read_as_they_are(offset: int, dtype: torch.dtype) -> None:
    qkv = random(2, 37, 3, 4, 24 + 8, dtype=dtype)[..., offset : offset + 24]
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    verify(q, k)


def test_a_scale_of_ones_own() -> None:
    verify(random(1, 2, 20, 16), random(1, 2, 20, 16, seed=1), scale=0.7)


def test_logits_far_from_zero_do_not_overflow() -> None:
    verify(
        random(1, 2, 40, 16) * 30, random(1, 2, 40, 16, seed=1) * 30, tolerance=4096 * 2.0**-22
    )  # logits of up to 4096 in float32


def test_a_token_with_nan_spoils_the_sums_of_its_own_head_mean_alone() -> None:
    q, k = random(2, 2, 20, 16), random(2, 2, 20, 16, seed=1)
    q[1, 0, 3, 5] = float("nan")
    found = backend.attention_received(q, k)
    assert found[1].isnan().all() and not found[0].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (1, 0, 4, 8), (1, 2, 0, 8)])
def test_nothing_to_attend_gives_zeros(shape: tuple[int, ...]) -> None:
    found = backend.attention_received(torch.zeros(shape), torch.zeros(*shape[:2], 5, 8))
    assert found.shape == (shape[0], 5) and not found.any()


def test_the_public_operator_runs_it_where_triton_is_forced() -> None:
    q, k = random(1, 2, 9, 16), random(1, 2, 9, 16, seed=1)
    with fastcache.use_backend("triton"):
        assert fastcache.backends.choose(q.device, q.dtype, "attention_received") is backend
        torch.testing.assert_close(
            attention_received(q, k).double(),
            logits_of(q, k).softmax(-1).mean(1).sum(1),
            rtol=2e-5,
            atol=2e-5,
        )
