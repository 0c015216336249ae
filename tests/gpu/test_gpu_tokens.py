"""Operators on tokens on a GPU, and whole generations of the methods that use them."""

import hosts
import pytest
import torch
from on_device import available

from fastcache import DuCa, TaylorSeer, ToCa, accelerate, backends, ops, use_backend
from fastcache.backends import eager, take_index_errors

STEPS = 20


def backends_of(operator: str) -> list[str]:
    """Backends with a kernel of an operator, and the definition."""
    return [name for name in backends.ORDER["cuda"] if operator in backends.IMPLEMENTS[name]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", backends_of("select_tokens_"))
@pytest.mark.parametrize(("N", "cell"), [(1, 0), (255, 0), (256, 2), (1024, 4), (4096, 2), (23850, 0)])
def test_a_gpu_chooses_the_tokens_that_a_cpu_chooses(
    backend: str, N: int, cell: int, device: torch.device
) -> None:
    score = random(5, N, seed=N)
    score[1] = score[1].mul(2).round()  # ties
    score[2, : N // 3] = float("nan")
    age = torch.randint(0, 4, (5, N), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    counts = torch.tensor([0, N // 2, N // 3, N // 7, N], dtype=torch.int32)
    options = dict(
        age_weight=0.25 / 3, width=int(N**0.5) if cell else 0, cell=cell, bonus=0.6 if cell else 0.0
    )
    expected_age, found_age = age.clone(), age.to(device)
    expected = eager.select_tokens_(score, expected_age, counts, N, normalize=False, **options)
    with use_backend(available(backend)):
        found = ops.select_tokens_(
            score.to(device), found_age, counts.to(device), N, normalize=False, **options
        )
    for one, other in zip((*found, found_age), (*expected, expected_age), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", backends_of("row_score"))
def test_scores_and_errors_equal_their_formulas(
    backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, y, v = (
        random(2, 67, 1152, dtype=dtype),
        random(2, 67, 1152, dtype=dtype, seed=1),
        random(2, 67, 3, 4, 72, dtype=dtype).permute(2, 0, 3, 1, 4)[2],
    )
    features = [random(2, 33, 160, dtype=dtype, seed=seed) for seed in range(8)]
    with use_backend(available(backend)):
        close(ops.row_score(x.to(device)), eager.row_score(x.double()))
        close(ops.row_score(x.to(device), y.to(device)), eager.row_score(x.double(), y.double()))
        close(ops.value_norm(v.to(device)), eager.value_norm(v.double()))
        close(
            ops.relative_error([f.to(device) for f in features[:2]], [f.to(device) for f in features[2:]]),
            eager.relative_error([f.double() for f in features[:2]], [f.double() for f in features[2:]]),
        )


@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize(("N", "d"), [(16, 16), (256, 72), (1024, 72), (333, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", backends_of("attention_received"))
def test_attention_received_is_the_column_sum_of_the_map(
    backend: str, dtype: torch.dtype, N: int, d: int, given: bool, device: torch.device
) -> None:
    q, k = random(2, N, 3, 4, d, dtype=dtype).permute(2, 0, 3, 1, 4)[:2]
    logits = q.double() @ k.double().transpose(-1, -2) * d**-0.5
    lse = logits.logsumexp(-1).float().to(device) if given else None
    with use_backend(available(backend)):
        found = ops.attention_received(q.to(device), k.to(device), lse)
    close(found, logits.softmax(-1).mean(1).sum(1), 2e-4 if dtype is torch.float32 else 2e-3)


def test_a_count_out_of_range_is_clamped_and_flagged(device: torch.device, gpu_alone: None) -> None:
    age = torch.zeros(1, 8, dtype=torch.int32, device=device)
    with use_backend(available("cuda")):
        choice = ops.select_tokens_(
            torch.rand(1, 8, device=device), age, torch.tensor([99], dtype=torch.int32, device=device), 4
        )
    assert (choice.index >= 0).sum() == 4
    assert take_index_errors(device) == "counts"


def test_a_bad_token_index_is_left_out_and_flagged(device: torch.device, gpu_alone: None) -> None:
    found = ops.slot_map(torch.tensor([[3, 99]], device=device), 5)
    assert found.slots.tolist() == [[-1, -1, -1, 0, -1]]
    assert take_index_errors(device) == "index"


@torch.no_grad()
def test_a_captured_choice_follows_scores_and_counts(device: torch.device, gpu_alone: None) -> None:
    score, counts = (
        torch.rand(3, 500, device=device),
        torch.tensor([5, 50, 0], dtype=torch.int32, device=device),
    )
    age = torch.zeros(3, 500, dtype=torch.int32, device=device)
    with use_backend(available("cuda")):
        ops.select_tokens_(score, age, counts, 60)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            choice = ops.select_tokens_(score, age, counts, 60)
    score.copy_(torch.rand(3, 500)), counts.copy_(torch.tensor([60, 1, 7])), age.zero_()
    graph.replay()
    expected = eager.select_tokens_(score.cpu(), torch.zeros(3, 500, dtype=torch.int32), counts.cpu(), 60)
    assert torch.equal(choice.slots.cpu(), expected[0]) and torch.equal(choice.index.cpu(), expected[1])


METHODS = [
    ToCa(3, 0.3),
    ToCa(3, 0.3, "similarity"),
    ToCa(3, 0.3, "norm"),
    DuCa(3, 0.3, "kv-norm"),
    DuCa(5, 0.3, reproduce_reference=True),
    TaylorSeer(4, 3),
]


@torch.no_grad()
def generation(policy, device: torch.device, backend: str) -> list[torch.Tensor]:
    model = hosts.small_dit().to(device)
    calls = [tuple(tensor.to(device) for tensor in hosts.inputs(step)) for step in range(STEPS)]
    with use_backend(backend), accelerate(model, policy, STEPS, calls_per_step=1) as session:
        session.begin(timesteps=torch.stack([t[0] for _, t, _ in calls]), conditions={"y": calls[0][2]})
        return [model(*call).cpu() for call in calls]


@pytest.mark.parametrize("policy", METHODS, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton", "eager"])
def test_a_method_on_a_gpu_equals_eager_on_a_cpu(backend: str, policy, device: torch.device) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        found = generation(policy, device, available(backend))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    for one, other in zip(found, generation(policy, torch.device("cpu"), "eager"), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("policy", METHODS, ids=str)
@torch.no_grad()
def test_no_step_of_a_method_waits_for_the_gpu(policy, device: torch.device, gpu_alone: None) -> None:
    model = hosts.small_dit().to(device)
    calls = [tuple(tensor.to(device) for tensor in hosts.inputs(step)) for step in range(STEPS)]
    with accelerate(model, policy, STEPS, calls_per_step=1, count_ops=False):
        for call in calls:  # compiles, checks itself, allocates
            model(*call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                model(*call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
