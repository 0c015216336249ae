"""Scores of tokens and errors of calibration, against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from support import available_backends

import fastcache
from fastcache.backends import eager, eager_tokens
from fastcache.ops import attention_received, relative_error, row_score, value_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPERATORS = ("row_score", "value_norm", "attention_received", "relative_error")


def on(operator: str):
    return pytest.mark.parametrize("backend", available_backends("cpu", operator))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol)


@on("row_score")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 3, 1), (2, 7, 111), (1, 4, 1152), (0, 3, 8), (2, 0, 8)])
def test_row_scores_are_norms_and_cosines(backend, dtype, shape) -> None:
    x, reference = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    with fastcache.use_backend(backend):
        close(row_score(x), x.double().norm(dim=-1))
        close(
            row_score(x, reference), 1 - F.cosine_similarity(x.double(), reference.double(), dim=-1, eps=1e-8)
        )


@on("row_score")
def test_a_row_of_zeros_is_like_nothing(backend) -> None:
    with fastcache.use_backend(backend):
        assert row_score(torch.zeros(1, 1, 16), torch.ones(1, 1, 16)).item() == 1.0


@on("value_norm")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 16), (1, 1, 3, 1), (2, 3, 7, 72), (1, 16, 33, 64), (2, 4, 0, 16)]
)
def test_value_norm_sums_over_heads(backend, dtype, shape) -> None:
    v = random(*shape, dtype=dtype)
    with fastcache.use_backend(backend):
        close(value_norm(v), (1 - v.double().norm(dim=-1)).sum(1))


@on("value_norm")
def test_value_norm_reads_the_views_of_a_packed_projection(backend) -> None:
    qkv = random(2, 9, 3, 4, 16)
    v = qkv.permute(2, 0, 3, 1, 4)[2]
    with fastcache.use_backend(backend):
        assert torch.equal(value_norm(v), value_norm(v.contiguous()))


@on("attention_received")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(6, 6), (5, 9), (1, 1), (130, 130), (4, 0)])
@pytest.mark.parametrize("given", [True, False])
def test_attention_received_is_the_column_sum_of_the_map(backend, dtype, N, M, given) -> None:
    q, k = random(2, 3, N, 24, dtype=dtype), random(2, 3, M, 24, dtype=dtype, seed=1)
    logits = q.double() @ k.double().transpose(-1, -2) * 24**-0.5
    lse = logits.logsumexp(-1).float() if given else None
    with fastcache.use_backend(backend):
        close(attention_received(q, k, lse), logits.softmax(-1).mean(1).sum(1), 2e-5)


@on("attention_received")
def test_attention_received_takes_a_scale_and_strided_heads(backend) -> None:
    qkv = random(2, 9, 3, 4, 16)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    with fastcache.use_backend(backend):
        close(
            attention_received(q, k, scale=0.5),
            (q.double() @ k.double().transpose(-1, -2) * 0.5).softmax(-1).mean(1).sum(1),
        )


def test_attention_received_never_holds_the_map(monkeypatch) -> None:
    B, H, N, d = 1, 2, 2048, 8
    monkeypatch.setattr(eager_tokens, "CHUNK_LOGITS", B * H * N * 64)
    q, k = random(B, H, N, d), random(B, H, N, d, seed=1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)),
                ]
            )
            return out

    with Watch():
        eager.attention_received(q, k)
    assert largest <= B * H * N * 64 < N * N


@on("relative_error")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "K"), [(1, 1), (5, 3), (56, 3), (2, 0)])
def test_relative_error_is_that_of_the_calibration(backend, dtype, L, K) -> None:
    newest = [random(2, 6, 40, dtype=dtype, seed=j) for j in range(L)]
    earlier = [random(2, 6, 40, dtype=dtype, seed=100 + j) for j in range(K * L)]
    with fastcache.use_backend(backend):
        found = relative_error(newest, earlier)
    assert found.shape == (K, L)
    for k in range(K):
        for j in range(L):
            old, new = earlier[k * L + j].double(), newest[j].double()
            assert float(found[k, j]) == pytest.approx(
                float((old - new).abs().sum() / new.abs().sum()), rel=1e-5
            )


@on("relative_error")
def test_relative_error_of_nothing_is_defined(backend) -> None:
    zero, one = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    with fastcache.use_backend(backend):
        found = relative_error([zero, zero, one], [one, zero, torch.full((1, 2, 4), float("nan"))])
    assert found[0, 0].isinf() and found[0, 1].isnan() and found[0, 2].isnan()


@pytest.mark.parametrize(
    "call",
    [
        lambda: row_score(torch.zeros(2, 3)),
        lambda: row_score(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)),
        lambda: value_norm(torch.zeros(2, 3, 4)),
        lambda: attention_received(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4)),
        lambda: attention_received(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3)),
        lambda: relative_error([], []),
        lambda: relative_error([torch.zeros(1, 2, 3)] * 2, [torch.zeros(1, 2, 3)]),
        lambda: relative_error([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)]),
        lambda: row_score(torch.zeros(1, 2, 3).transpose(1, 2)),
    ],
)
def test_bad_shapes_are_named(call) -> None:
    with pytest.raises((ValueError, RuntimeError), match="x:|reference:|v:|k:|lse:|newest|earlier"):
        call()


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_refuse_inputs_that_need_a_gradient(operator) -> None:
    x = torch.zeros(1, 2, 3, requires_grad=True)
    four = torch.zeros(1, 2, 3, 4, requires_grad=True)
    calls = {
        "row_score": lambda: row_score(x),
        "value_norm": lambda: value_norm(four),
        "attention_received": lambda: attention_received(four, four),
        "relative_error": lambda: relative_error([x], [x]),
    }
    with pytest.raises(RuntimeError, match="forward-only"):
        calls[operator]()


@pytest.mark.parametrize("operator", ["select_tokens_", *OPERATORS])
def test_registered_operators_pass_opcheck(operator) -> None:
    x, four = random(2, 6, 16), random(2, 3, 6, 8)
    arguments = {
        "select_tokens_": (
            torch.rand(2, 6),
            torch.zeros(2, 6, dtype=torch.int32),
            torch.tensor([2, 3], dtype=torch.int32),
            4,
            0.1,
            True,
            3,
            1,
            0.5,
        ),
        "row_score": (x, x),
        "value_norm": (four,),
        "attention_received": (four, four, None, 0.3),
        "relative_error": ([x, x], [x, x, x, x]),
    }
    torch.library.opcheck(getattr(torch.ops.fastcache, operator).default, arguments[operator])
