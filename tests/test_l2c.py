"""L2C: router files, pairs of steps, and the counts of the released routers.

Method: docs/methods/l2c.md, "Conformance".
"""

import json

import pytest
import torch
from hosts import STEPS, run, small_dit
from safetensors.torch import save_file
from torch import Tensor, nn

import fastcache
from fastcache import L2C, ScheduleError
from fastcache.schedule import COMPUTE, Branch, Layout


def layout(depth: int) -> Layout:
    return Layout(
        "DiT",
        256,
        1152,
        16,
        tuple(Branch(index // 2, ("attn", "mlp")[index % 2], 1) for index in range(2 * depth)),
    )


def routers(num_steps: int, depth: int, *, seed: int = 0) -> dict[int, Tensor]:
    """Random parameters for every step index."""
    generator = torch.Generator().manual_seed(seed)
    return {s: 3 * torch.randn(2 * depth, generator=generator) for s in range(num_steps)}


def with_active(num_steps: int, depth: int, attn: int, mlp: int) -> dict[int, Tensor]:
    """Parameters of which exactly `attn` and `mlp` are above sigmoid = 0.1 on cache steps; those of odd
    indices all are.
    """
    generator = torch.Generator().manual_seed(7)
    cached = num_steps // 2
    chosen = torch.full((cached, depth, 2), -4.0)
    for kind, count in enumerate((attn, mlp)):
        order = torch.randperm(cached * depth, generator=generator)[:count]
        chosen[order // depth, order % depth, kind] = -1.0
    return {
        s: chosen[s // 2].flatten() if s % 2 == 0 else torch.full((2 * depth,), 5.0) for s in range(num_steps)
    }


def computed(plan) -> int:
    return sum(action == COMPUTE for step in plan.steps for action in step.actions)


def saved(content, path):
    torch.save(content, path)
    return path


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "attn", "mlp", "active", "overall"), [(50, 371, 365, 736, 2136), (20, 157, 155, 312, 872)]
)
def test_counts_are_those_of_the_released_routers(
    tmp_path, steps: int, attn: int, mlp: int, active: int, overall: int
) -> None:
    plan = L2C.from_router(saved(with_active(steps, 28, attn, mlp), tmp_path / "r.pt")).schedule(
        steps, layout(28)
    )
    cache_steps = plan.steps[1::2]
    assert sum(action == COMPUTE for step in cache_steps for action in step.actions) == active
    assert computed(plan) == overall and steps * 56 == {50: 2800, 20: 1120}[steps]
    assert all(step.kind == "full" for step in plan.steps[::2])
    by_name = {
        name: sum(
            step.actions[i] == COMPUTE
            for step in cache_steps
            for i, branch in enumerate(plan.layout.branches)
            if branch.name == name
        )
        for name in ("attn", "mlp")
    }
    assert by_name == {"attn": attn, "mlp": mlp}


def test_execution_step_k_follows_index_t_minus_1_minus_k_and_entry_2l_is_attention(tmp_path) -> None:
    found = routers(6, 2)
    plan = L2C.from_router(saved(found, tmp_path / "r.pt"), threshold=0.3).schedule(6, layout(2))
    for k in (1, 3, 5):
        expected = found[5 - k].sigmoid() > 0.3
        assert [action == COMPUTE for action in plan.steps[k].actions] == expected.tolist()
    assert [(branch.block, branch.name) for branch in plan.layout.branches] == [
        (0, "attn"),
        (0, "mlp"),
        (1, "attn"),
        (1, "mlp"),
    ]


def test_a_value_equal_to_the_threshold_is_reused(tmp_path) -> None:
    path = saved({0: torch.tensor([0.0, 1e-3]), 1: torch.zeros(2)}, tmp_path / "r.pt")
    assert [
        action == COMPUTE
        for action in L2C.from_router(path, threshold=0.5).schedule(2, layout(1)).steps[1].actions
    ] == [False, True]


def test_the_indexed_json_gives_the_same_plan(tmp_path) -> None:
    policy = L2C.from_router(saved(routers(8, 3), tmp_path / "r.pt"))
    plan = policy.schedule(8, layout(3))
    policy.published.save(tmp_path / "l2c.json")
    entries = json.loads((tmp_path / "l2c.json").read_text())
    assert list(entries) == ["attn-0", "mlp-0", "attn-1", "mlp-1", "attn-2", "mlp-2"]
    assert L2C.from_json(tmp_path / "l2c.json").schedule(8, layout(3)).steps == plan.steps
    assert fastcache.SmoothCache(tmp_path / "l2c.json").schedule(8, layout(3)).steps == plan.steps


# -- containers ---------------------------------------------------------------------------------------


class Routers(nn.Module):
    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.routers = nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)


@pytest.mark.parametrize(
    "pack",
    [
        lambda r: r,
        lambda r: {str(s): t for s, t in r.items()},
        lambda r: {s: t for s, t in r.items() if s % 2 == 0},
        lambda r: {s: nn.Parameter(t) for s, t in r.items()},
        lambda r: list(r.values()),
        lambda r: torch.stack(list(r.values())),
        lambda r: {"routers": r},
        lambda r: {"state_dict": Routers(list(r.values())).state_dict()},
        lambda r: Routers(list(r.values())).state_dict(),
        lambda r: {f"module.routers.{s}.prob": t for s, t in r.items()},
    ],
    ids=["int", "str", "even", "parameters", "list", "tensor", "nested", "nested-state", "state", "module"],
)
def test_every_container_gives_the_same_plan(tmp_path, pack) -> None:
    expected = L2C.from_router(saved(routers(6, 2), tmp_path / "plain.pt")).schedule(6, layout(2))
    assert (
        L2C.from_router(saved(pack(routers(6, 2)), tmp_path / "packed.pt")).schedule(6, layout(2)).steps
        == expected.steps
    )


def test_safetensors_are_read(tmp_path) -> None:
    save_file({f"routers.{s}": t for s, t in routers(6, 2).items()}, tmp_path / "r.safetensors")
    expected = L2C.from_router(saved(routers(6, 2), tmp_path / "r.pt"))
    assert L2C.from_router(tmp_path / "r.safetensors") == expected


def test_a_file_with_code_is_not_executed(tmp_path) -> None:
    with pytest.raises(ValueError, match="more than tensors"):
        L2C.from_router(saved(Routers([torch.zeros(2)]), tmp_path / "r.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {0: torch.zeros(2, 2, 1), 1: torch.zeros(4)},
            r"expected a float tensor \[2L\], got torch.float32 \[2, 2, 1\]",
        ),
        ({0: torch.zeros(3), 1: torch.zeros(3)}, r"expected a float tensor \[2L\]"),
        (
            {0: torch.zeros(4, dtype=torch.int64), 1: torch.zeros(4)},
            r"expected a float tensor \[2L\], got torch.int64",
        ),
        ({0: torch.zeros(4), 1: torch.zeros(6)}, "lengths \\[4, 6\\]"),
        ({0: torch.zeros(4), 3: torch.zeros(4)}, "expected step indices"),
        ({"alpha": torch.zeros(4), "beta": torch.zeros(4)}, "names no step index"),
        ({"a.0": torch.zeros(4), "b.0": torch.zeros(4)}, "two entries for step index 0"),
        ({0: [0.5, 0.5], 1: [0.5, 0.5]}, r"expected a float tensor \[2L\], got list"),
        ([], "expected a mapping"),
        ({}, "expected a mapping"),
    ],
)
def test_what_is_no_router_is_an_error(tmp_path, content, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2C.from_router(saved(content, tmp_path / "r.pt"))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="router"):
        L2C.from_router(tmp_path / "none.pt")


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_a_threshold_outside_of_a_sigmoid_is_refused(tmp_path, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        L2C.from_router(saved(routers(4, 2), tmp_path / "r.pt"), threshold)


# -- step counts and layers -----------------------------------------------------------------------------


def test_odd_step_counts_are_a_clear_error(tmp_path) -> None:
    with pytest.raises(ScheduleError, match="pairs steps, expected an even number"):
        L2C.from_router(saved(routers(5, 2), tmp_path / "odd.pt"))
    policy = L2C.from_router(saved(routers(6, 2), tmp_path / "r.pt"))
    with pytest.raises(ScheduleError, match="pairs steps, expected an even number, got 5"):
        policy.schedule(5, layout(2))
    with pytest.raises(ScheduleError, match="has 6 steps, got 8"):
        policy.schedule(8, layout(2))
    with pytest.raises(ScheduleError, match="even number of steps, got 3"):
        L2C({"attn": [1, 0, 1], "mlp": [1, 1, 1]})


@pytest.mark.parametrize(("depth", "message"), [(1, "matches no branch"), (3, "another number of layers")])
def test_a_router_for_another_depth_is_refused(tmp_path, depth: int, message: str) -> None:
    policy = L2C.from_router(saved(routers(6, 2), tmp_path / "r.pt"))
    with pytest.raises(ScheduleError, match=message):
        policy.schedule(6, layout(depth))


def test_a_schedule_that_is_not_in_pairs_is_refused() -> None:
    with pytest.raises(ScheduleError, match="step 2 reuses"):
        L2C({"attn-0": [1, 0, 0, 1], "mlp-0": [1, 0, 1, 0]})


@torch.no_grad()
def test_a_router_runs_on_a_model(tmp_path) -> None:
    model = small_dit()
    policy = L2C(saved(routers(STEPS, 3), tmp_path / "r.pt"))
    uncached = run(model)
    with fastcache.accelerate(model, policy, STEPS) as session:
        found = run(model)
    assert torch.allclose(found[0], uncached[0], atol=1e-5) and torch.allclose(
        found[2], uncached[2], atol=1e-4
    )
    assert not torch.allclose(found[1], uncached[1], atol=1e-4)
    assert session.summary().recomputed == 0
    assert policy.fields()["threshold"] == 0.1
