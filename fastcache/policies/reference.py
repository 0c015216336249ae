"""The FLOP formula of the ToCa family's code, per module and call (docs/methods/README.md, "FLOP formulas").

It counts the blocks alone, one FLOP a multiply-add in the adaLN projection and two elsewhere, and
serves only to compare with published figures; `StepPlan.flops` is the model's own count.
"""

from fastcache.plan.actions import Kind
from fastcache.plan.layout import Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.step import StepPlan


def attention_flops(layout: Layout, batch: int) -> int:
    """Self-attention on all tokens: qkv, scores, softmax, weighted sum, projection."""
    B, N, C, H = batch, layout.tokens, layout.width, layout.heads
    return 6 * B * N * C**2 + B * N * C + 4 * B * H * N**2 * (C // H) + 5 * B * H * N**2 + 2 * B * N * C**2


def mlp_flops(layout: Layout, batch: int, tokens: int) -> int:
    """MLP with ratio 4 on `tokens` tokens a sample."""
    B, C = batch, layout.width
    return 16 * B * tokens * C**2 + 24 * B * tokens * C


def block_overhead_flops(layout: Layout, batch: int) -> int:
    """LayerNorm, counted once a block with all tokens, and the adaLN projection."""
    B, N, C = batch, layout.tokens, layout.width
    return 2 * B * N * C + B * C + 6 * B * C**2


def full_block_flops(layout: Layout, batch: int) -> int:
    """A block that computes everything."""
    return (
        attention_flops(layout, batch)
        + mlp_flops(layout, batch, layout.tokens)
        + block_overhead_flops(layout, batch)
    )


def plan_flops(schedule: Schedule, batch: int) -> int:
    """A plan of full, partial and skipped steps; a block that a step leaves out counts nothing."""
    flops = {id(step): _step_flops(step, batch) for step in schedule.distinct}
    return sum(flops[id(step)] for step in schedule.steps)


def _step_flops(step: StepPlan, batch: int) -> int:
    layout = step.layout
    total = len(step.run_blocks) * block_overhead_flops(layout, batch)
    for action, branch in zip(step.actions, layout.branches, strict=True):
        if branch.name == "mlp" and action.kind in (Kind.COMPUTE, Kind.REFRESH):
            tokens = layout.tokens if action.kind is Kind.COMPUTE else action.fresh_tokens
            total += mlp_flops(layout, batch, tokens)
        elif action.kind is Kind.COMPUTE:
            total += attention_flops(layout, batch)
    return total
