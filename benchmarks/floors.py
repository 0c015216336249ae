"""What limits a cached step: arithmetic, weights, or the stream, each from the plan and from what the run
measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine import Bandwidth
from fastcache.schedule import Kind, Layout, StepPlan, full_step

WIDTH = 4  # bytes of a float32


@dataclass(frozen=True)
class Floors:
    """What a step of a plan takes at least, in ms, each alone: its FLOPs at the rate of an uncached step; the
    weights that its bodies and modulations read; features and stream, each byte once."""

    arithmetic: float
    weights: float
    stream: float


def floors_of(
    plans: Sequence[StepPlan], batch: int, full_ms: float, bandwidth: Bandwidth, *, modulated: bool
) -> Floors:
    """Medians over steps of one kind. modulated: a step computes its own modulation (no table)."""
    full = full_step(plans[0].layout).flops(batch)
    return Floors(
        full_ms * statistics.median(plan.flops(batch) for plan in plans) / full,
        1e-6
        * statistics.median(weight_bytes(plan, modulated=modulated) for plan in plans)
        / bandwidth.read_gbps,
        1e-6 * statistics.median(stream_bytes(plan, batch) for plan in plans) / bandwidth.copy_gbps,
    )


def ridge_rows(layout: Layout, batch: int, full_ms: float, read_gbps: float) -> float:
    """Rows of a float32 GEMM whose arithmetic, at the uncached step's rate, takes as long as reading its
    weights."""
    return WIDTH / 2 * (1e3 * full_step(layout).flops(batch) / full_ms) / (1e9 * read_gbps)


def weight_bytes(step: StepPlan, *, modulated: bool) -> int:
    """Weights of every body that runs, whatever the number of its tokens, and of the modulations.

    A weight is 2 FLOPs a token.
    """
    layout, total = step.layout, 0
    for action, branch in zip(step.actions, layout.branches, strict=True):
        refreshes = action.kind is Kind.REFRESH and action.tokens and not step.skip
        total += branch.flops_per_token // 2 if action.kind is Kind.COMPUTE or refreshes else 0
    return WIDTH * (total + (layout.modulation_flops // 2 * len(step.run_blocks) if modulated else 0))


def stream_bytes(step: StepPlan, batch: int) -> int:
    """Features and stream, in tensors [B, N, D]: a reused feature is read, a refreshed one read and written
    in part, a forecast reads order + 1, and a computed one is passed through with the stream on both sides of
    its body."""
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
