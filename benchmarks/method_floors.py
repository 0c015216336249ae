"""What limits a cached step: arithmetic, weights, or the stream, each from the plan and from what the run measured."""

import statistics

from benchmarks.methods import UNCACHED, Floors, Method, ModelSize
from fastcache.hosts import recognise
from fastcache.models import DiT
from fastcache.schedule import Kind, Layout, StepPlan, full_step

WIDTH = 4  # bytes of a float32


def floors_of(
    size: ModelSize,
    method: Method | None,
    full_ms: float,
    copy_gbps: float,
    read_gbps: float,
    *,
    modulated: bool,
) -> dict[str, Floors]:
    """By kind of step, medians over its steps. modulated: the step computes its own modulation (no table)."""
    layout = recognise(DiT.from_config(size.config)).layout()
    plans = {UNCACHED: [full_step(layout)]} if method is None else {}
    for step in () if method is None else method.policy(size.steps).schedule(size.steps, layout).steps:
        plans.setdefault(step.kind, []).append(step)
    return {
        kind: _median(
            [
                step_floors(step, size.batch, full_ms, copy_gbps, read_gbps, modulated=modulated)
                for step in found
            ]
        )
        for kind, found in plans.items()
    }


def step_floors(
    step: StepPlan, batch: int, full_ms: float, copy_gbps: float, read_gbps: float, *, modulated: bool
) -> Floors:
    """Of one step."""
    arithmetic = full_ms * step.flops(batch) / full_step(step.layout).flops(batch)
    return Floors(
        arithmetic,
        1e-6 * weight_bytes(step, modulated=modulated) / read_gbps,
        1e-6 * stream_bytes(step, batch) / copy_gbps,
    )


def ridge_rows(size: ModelSize, full_ms: float, read_gbps: float) -> float:
    """Rows of a float32 GEMM whose arithmetic, at the rate of the uncached step, takes as long as reading its weights."""
    flops = full_step(recognise(DiT.from_config(size.config)).layout()).flops(size.batch)
    return WIDTH / 2 * (1e3 * flops / full_ms) / (1e9 * read_gbps)


def weight_bytes(step: StepPlan, *, modulated: bool) -> int:
    """Weights of every body that runs, whatever the number of its tokens, and of the modulations; 2 FLOPs a weight and token."""
    layout, blocks = step.layout, step.run_blocks
    bodies = sum(
        branch.flops_per_token // 2
        for action, branch in zip(step.actions, layout.branches, strict=True)
        if action.kind is Kind.COMPUTE or (action.kind is Kind.REFRESH and action.tokens and not step.skip)
    )
    return WIDTH * (bodies + (layout.modulation_flops // 2 * len(blocks) if modulated else 0))


def stream_bytes(step: StepPlan, batch: int) -> int:
    """Features and stream, in tensors [B, N, D]: a reused feature is read, a refreshed one read and written in part,
    a forecast reads order + 1, and a computed one is passed through with the stream on both sides of its body."""
    layout: Layout = step.layout
    if step.skip:
        return 0
    total, launches = 0.0, 0
    for action in step.actions:
        share = min(action.tokens, layout.tokens) / layout.tokens if action.kind is Kind.REFRESH else 1.0
        if action.kind is Kind.COMPUTE:
            total, launches = total + 2, launches + 1
        elif action.kind is Kind.REFRESH:
            total, launches = total + 1 + 3 * share, launches + bool(action.tokens)
        else:
            total += (action.order or 0) + 1 if action.kind is Kind.FORECAST else 1
    return int(WIDTH * batch * layout.tokens * layout.width * (total + 2 * (launches + 1)))


def _median(found: list[Floors]) -> Floors:
    return Floors(
        *(
            statistics.median(getattr(one, name) for one in found)
            for name in ("arithmetic", "weights", "stream")
        )
    )
