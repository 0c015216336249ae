"""What the tests of ToCa and DuCa share: layouts of every family, and plans in the form of the golden
data.
"""

from fastcache.schedule import COMPUTE, REUSE, Branch, Kind, Layout, Schedule, StepPlan

BRANCHES = {"DiT": ("attn", "mlp"), "PixArt": ("attn", "cross", "mlp"), "STDiT3": ("attn", "cross", "mlp")}


def layout(family: str = "DiT", tokens: int = 256, blocks: int | None = None) -> Layout:
    """A model of XL/2 width: 28 layers, which are 56 blocks of STDiT3."""
    depth = blocks or (56 if family == "STDiT3" else 28)
    return Layout(
        family,
        tokens,
        1152,
        16,
        tuple(Branch(block, name, 1) for block in range(depth) for name in BRANCHES[family]),
    )


def tokens_at(schedule: Schedule, k: int, block: int, name: str) -> int | None:
    """K of a branch at the k-th executed step; None if it refreshes no tokens."""
    [index] = [
        index
        for index, branch in enumerate(schedule.layout.branches)
        if (branch.block, branch.name) == (block, name)
    ]
    return schedule.steps[k].actions[index].tokens


def kinds(schedule: Schedule) -> str:
    """A letter a step: F full, P partial, A skipped, M mixed."""
    return "".join(
        {"full": "F", "partial": "P", "skip": "A", "mixed": "M"}[step.kind] for step in schedule.steps
    )


def computed_blocks(schedule: Schedule) -> int:
    """Blocks that compute everything, over all steps."""
    return sum(
        all(step.actions[index] == COMPUTE for index, _ in schedule.layout.branches_of(block))
        for step in schedule.steps
        for block in range(schedule.layout.depth)
    )


def as_recorded(step: StepPlan) -> object:
    """A step's plan in the form of `GoldenActions.actions`."""
    family, depth = step.layout.family, step.layout.depth
    blocks = [[step.actions[index] for index, _ in step.layout.branches_of(block)] for block in range(depth)]
    if family == "DiT":
        return "".join(_letter(step, actions) for actions in blocks)
    if family == "PixArt":
        return [_pixart(step, actions) for actions in blocks]
    modules = [["skip" if step.skip else _module(action) for action in actions] for actions in blocks]
    return [modules[block : block + 2] for block in range(0, depth, 2)]


def _letter(step: StepPlan, actions: list) -> str:
    if actions == [COMPUTE] * len(actions):
        return "F"
    if step.skip:
        return "A"
    assert actions[0] == REUSE and all(action.kind is Kind.REFRESH for action in actions[1:])
    return "P"


def _pixart(step: StepPlan, actions: list) -> list:
    letter = _letter(step, actions)
    return {"F": ["full"], "A": ["skip"], "P": ["partial", *(action.tokens for action in actions[1:])]}[
        letter
    ]


def _module(action) -> object:
    return {Kind.COMPUTE: "full", Kind.REUSE: "reuse", Kind.REFRESH: action.tokens}[action.kind]
