"""What is done at every step, layer and branch: the vocabulary that every policy compiles to."""

import enum
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from fastcache.errors import ScheduleError

FORMAT = "fastcache-schedule/1"


class Kind(enum.Enum):
    """Where a branch's feature comes from at a step."""

    COMPUTE = "C"  # computed on all tokens, and stored
    REUSE = "R"  # the stored one
    REFRESH = "P"  # the stored one, after some tokens were recomputed into it
    FORECAST = "F"  # a linear combination of the last order + 1 stored ones


@dataclass(frozen=True, slots=True)
class Action:
    """One cell of the plan. `tokens` per sample of a REFRESH, `order` of a FORECAST."""

    kind: Kind
    tokens: int | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is not None) != (self.kind is Kind.REFRESH) or (self.tokens or 0) < 0:
            raise ScheduleError(
                f"tokens: a REFRESH, and only a REFRESH, has a number of tokens >= 0, got {self.kind.name}"
                f" with {self.tokens}"
            )
        if (self.order is not None) != (self.kind is Kind.FORECAST) or (self.order or 0) < 0:
            raise ScheduleError(
                f"order: a FORECAST, and only a FORECAST, has an order >= 0, got {self.kind.name} with"
                f" {self.order}"
            )

    @property
    def code(self) -> str:
        """Short text form: C, R, P<tokens> or F<order>."""
        number = self.tokens if self.kind is Kind.REFRESH else self.order
        return self.kind.value + ("" if number is None else str(number))

    @staticmethod
    def from_code(code: str) -> "Action":
        """Inverse of `code`; ScheduleError for anything else."""
        try:
            kind = Kind(code[:1])
            number = int(code[1:]) if code[1:] else None
            if number is not None and kind in (Kind.COMPUTE, Kind.REUSE):
                raise ValueError(code)
        except ValueError:
            raise ScheduleError(f"action: expected C, R, P<tokens> or F<order>, got {code!r}") from None
        return Action(
            kind,
            tokens=number if kind is Kind.REFRESH else None,
            order=number if kind is Kind.FORECAST else None,
        )


COMPUTE = Action(Kind.COMPUTE)
REUSE = Action(Kind.REUSE)


def refresh(tokens: int) -> Action:
    """Recompute `tokens` tokens per sample into the stored feature, and use it."""
    return Action(Kind.REFRESH, tokens=tokens)


def forecast(order: int) -> Action:
    """Use a combination of the last order + 1 stored features."""
    return Action(Kind.FORECAST, order=order)


class Score(enum.Enum):
    """What a token's base score is. The first two are taken at a COMPUTE of the block's self-attention."""

    ATTENTION = "attention"  # attention that the token received, mean over heads
    KV_NORM = "kv-norm"  # sum over heads of 1 - ||v||
    SIMILARITY = "similarity"  # 1 - cosine of the branch's input and its stored feature, at each refresh
    NORM = "norm"  # norm of the branch's input, at each refresh
    RANDOM = "random"  # uniform in 0..1, from a generator of the session's own
    COMPRESS = "compress"  # half random, half attention over its largest
    STRAIGHT = "straight"  # one for every token: ages decide

    @property
    def taken(self) -> bool:
        """True if the score comes from a computed self-attention."""
        return self in (Score.ATTENTION, Score.KV_NORM, Score.COMPRESS)

    @property
    def local(self) -> bool:
        """True if the score needs the stream as it is before the branch: one selection a block."""
        return self in (Score.SIMILARITY, Score.NORM)

    @property
    def normalized(self) -> bool:
        """True if the base score is divided by its L2 norm over tokens."""
        return self not in (Score.RANDOM, Score.COMPRESS, Score.STRAIGHT)


@dataclass(frozen=True)
class Selection:
    """How the tokens of every REFRESH of a schedule are chosen (spec section 2.3).

    score + age_weight * age, where age counts the refreshes of the branch that left the token out;
    then, with `cell`, the best token of every cell x cell square of the token grid gains `bonus`
    times its own score; the best ones are taken. `seed` starts the random scores, which are the
    same for both halves of a CFG batch.
    """

    score: Score
    age_weight: float = 0.0
    cell: int = 0
    bonus: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.score, Score):
            object.__setattr__(self, "score", _score(self.score))
        if self.cell < 0 or (self.cell == 0) != (self.bonus == 0.0):
            raise ScheduleError(
                "cell, bonus: a bonus needs a cell of 1 or more tokens a side and a cell a bonus, got"
                f" cell={self.cell}, bonus={self.bonus}"
            )

    def to_dict(self) -> dict:
        """The settings as plain values, for JSON."""
        return {**asdict(self), "score": self.score.value}


def _score(name: object) -> Score:
    try:
        return Score(name)
    except ValueError:
        raise ScheduleError(
            f"score: expected one of {', '.join(score.value for score in Score)}, got {name!r}"
        ) from None


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch of a host. FLOPs count 2 per multiply-add, for one sample.

    block: index of the block in execution order. name: its name in the host (attn, mlp).
    flops_per_token: matrix-multiply FLOPs per computed token. flops_per_pair: attention FLOPs per
    (computed token, attended token) pair.
    """

    block: int
    name: str
    flops_per_token: int
    flops_per_pair: int = 0

    def flops(self, tokens: int, attended: int) -> int:
        """FLOPs of computing `tokens` tokens of one sample, each attending to `attended`."""
        return tokens * (self.flops_per_token + self.flops_per_pair * attended)


@dataclass(frozen=True)
class Layout:
    """The branches of a host in execution order, with what each costs.

    tokens N per sample; width D; fixed_flops per sample and step outside the blocks (embedders,
    final layer); modulation_flops per sample, step and block (adaLN projections).
    """

    family: str
    tokens: int
    width: int
    heads: int
    branches: tuple[Branch, ...]
    fixed_flops: int = 0
    modulation_flops: int = 0

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max((branch.block for branch in self.branches), default=-1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Branch names in the order in which they first appear."""
        return tuple(dict.fromkeys(branch.name for branch in self.branches))

    def branches_of(self, block: int) -> list[tuple[int, Branch]]:
        """(index in the plan, branch) of one block's branches."""
        return [(index, branch) for index, branch in enumerate(self.branches) if branch.block == block]


@dataclass(frozen=True)
class StepPlan:
    """The actions of one step, one per branch of the layout; `skip` replaces the whole trunk.

    In a skipped step a COMPUTE still runs its branch on the trunk's input and stores the feature,
    as the first block of DuCa's reference does when the interval changes in the middle of a step;
    every other action means nothing there.
    """

    layout: Layout
    actions: tuple[Action, ...]
    skip: bool = False

    def __post_init__(self) -> None:
        if len(self.actions) != len(self.layout.branches):
            raise ScheduleError(
                f"actions: expected one per branch ({len(self.layout.branches)}), got {len(self.actions)}"
            )

    @cached_property
    def kind(self) -> str:
        """full, reuse, partial, forecast or skip; mixed if full and cached branches meet."""
        if self.skip:
            return "skip"
        kinds = {action.kind for action in self.actions}
        if kinds <= {Kind.COMPUTE}:
            return "full"
        if Kind.COMPUTE in kinds:
            return "mixed"
        if Kind.REFRESH in kinds:
            return "partial"
        return "forecast" if Kind.FORECAST in kinds else "reuse"

    @cached_property
    def refreshes(self) -> bool:
        """True if some branch recomputes some tokens: not every partial step does."""
        return not self.skip and any(action.tokens for action in self.actions)

    def flops(self, batch: int = 1) -> int:
        """FLOPs of the whole model at this step: matrix multiplies and attention, 2 per MAC.

        The modulation projections of every block count in full, as the originals run them.
        """
        N = self.layout.tokens
        blocks = self.run_blocks
        total = self.layout.fixed_flops + self.layout.modulation_flops * len(blocks)
        for action, branch in zip(self.actions, self.layout.branches, strict=True):
            if branch.block not in blocks:
                continue
            if action.kind is Kind.COMPUTE:
                total += branch.flops(N, N)
            elif action.kind is Kind.REFRESH:
                total += branch.flops(min(action.tokens, N), N)
        return batch * total

    @cached_property
    def run_blocks(self) -> frozenset[int]:
        """Blocks that do anything: all of them, or those that compute in a skipped step."""
        if not self.skip:
            return frozenset(branch.block for branch in self.layout.branches)
        return frozenset(
            branch.block
            for action, branch in zip(self.actions, self.layout.branches, strict=True)
            if action.kind is Kind.COMPUTE
        )


@dataclass(frozen=True)
class Schedule:
    """A plan per step of one generation, in execution order.

    `policy` and `fields` are for people to read; `selection` says how refreshed tokens are chosen.
    """

    layout: Layout
    steps: tuple[StepPlan, ...]
    policy: str = ""
    fields: dict = field(default_factory=dict)
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            raise ScheduleError("steps: a schedule needs at least one step")
        for index, step in enumerate(self.steps):
            if step.layout is not self.layout and step.layout != self.layout:
                raise ScheduleError(f"steps[{index}]: was made for another layout")
        if self.refreshed and self.selection is None:
            raise ScheduleError(
                "selection: a schedule that refreshes tokens says how they are chosen, got None"
            )

    @property
    def num_steps(self) -> int:
        """Model evaluations per generation."""
        return len(self.steps)

    @cached_property
    def uncached(self) -> bool:
        """True if every step computes every branch: nothing is ever reused."""
        return all(step.kind == "full" for step in self.steps)

    @cached_property
    def skips(self) -> bool:
        """True if some step skips the trunk."""
        return any(step.skip for step in self.steps)

    @cached_property
    def refreshed(self) -> frozenset[int]:
        """Branches (indices in the plan) that some step refreshes."""
        return frozenset(
            index
            for step in self.steps
            for index, action in enumerate(step.actions)
            if action.kind is Kind.REFRESH
        )

    @cached_property
    def history(self) -> int:
        """Features that must be kept per branch: one, or as many as the highest order needs."""
        return 1 + max((action.order or 0 for step in self.steps for action in step.actions), default=0)

    def kinds(self) -> dict[str, int]:
        """Number of steps of each kind."""
        return dict(Counter(step.kind for step in self.steps))

    def flops(self, batch: int = 1) -> int:
        """FLOPs of one generation (StepPlan.flops summed)."""
        return sum(step.flops(batch) for step in self.steps)

    def uncached_flops(self, batch: int = 1) -> int:
        """FLOPs of the same generation with every branch computed at every step."""
        return self.num_steps * full_step(self.layout).flops(batch)

    def ideal_speedup(self) -> float:
        """Uncached FLOPs / planned FLOPs: the speedup if time were matrix multiplies alone."""
        return self.uncached_flops() / self.flops()

    def to_json(self) -> str:
        """The schedule as JSON text; `from_json` gives an equal schedule back."""
        layout = self.layout
        return json.dumps(
            {
                "format": FORMAT,
                "policy": self.policy,
                "fields": self.fields,
                "selection": None if self.selection is None else self.selection.to_dict(),
                "layout": {
                    "family": layout.family,
                    "tokens": layout.tokens,
                    "width": layout.width,
                    "heads": layout.heads,
                    "fixed_flops": layout.fixed_flops,
                    "modulation_flops": layout.modulation_flops,
                    "branches": [
                        [branch.block, branch.name, branch.flops_per_token, branch.flops_per_pair]
                        for branch in layout.branches
                    ],
                },
                "steps": [_step_text(step) for step in self.steps],
            },
            indent=1,
        )

    @staticmethod
    def from_json(text: str) -> "Schedule":
        """Read `to_json`'s form. Raises ScheduleError naming the entry that does not fit."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ScheduleError(f"schedule: not JSON: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ScheduleError(
                f"format: expected {FORMAT!r}, got"
                f" {found.get('format') if isinstance(found, dict) else type(found).__name__!r}"
            )
        try:
            shape = dict(found["layout"])
            layout = Layout(**{**shape, "branches": tuple(Branch(*entry) for entry in shape["branches"])})
            steps = tuple(_step_from_text(layout, index, line) for index, line in enumerate(found["steps"]))
            selection = None if found.get("selection") is None else Selection(**found["selection"])
        except (KeyError, TypeError) as error:
            raise ScheduleError(f"schedule: missing or malformed entry: {error}") from None
        return Schedule(layout, steps, found.get("policy", ""), found.get("fields", {}), selection)

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Schedule":
        """Read a file that `save` wrote."""
        return Schedule.from_json(Path(path).read_text())

    def to_smoothcache(self) -> dict[str, list[int]]:
        """SmoothCache's published form (see fastcache.plan.published): {"attn": [1, 0, ...]}, 1 = compute."""
        from fastcache.plan.published import publish

        return publish(self).to_dict()

    def union(self, other: "Schedule") -> "Schedule":
        """Compute where either schedule computes (fastcache.plan.editing.union)."""
        from fastcache.plan.editing import union

        return union(self, other)

    def with_branch(
        self, name: str, action: Action, *, block: int | None = None, steps: Iterable[int] | None = None
    ) -> "Schedule":
        """Replace the action of branches `name`, of one block or all, at some steps or all
        (fastcache.plan.editing.with_branch).
        """
        from fastcache.plan.editing import with_branch

        return with_branch(self, name, action, block=block, steps=steps)

    def draw(self, path: str | Path) -> None:
        """Write a picture of what every step (across) and branch (down) does. Needs matplotlib."""
        from fastcache.plan.drawing import draw_schedules

        draw_schedules({self.policy or "schedule": self}, path)


def full_step(layout: Layout) -> StepPlan:
    """A step that computes every branch."""
    return uniform_step(layout, COMPUTE)


def uniform_step(layout: Layout, action: Action) -> StepPlan:
    """A step in which every branch does the same."""
    return StepPlan(layout, (action,) * len(layout.branches))


def skip_step(layout: Layout) -> StepPlan:
    """A step that replaces the whole trunk by its last output."""
    return StepPlan(layout, (REUSE,) * len(layout.branches), skip=True)


def _step_text(step: StepPlan) -> str:
    actions = " ".join(action.code for action in step.actions)
    if not step.skip:
        return actions
    return f"skip {actions}" if step.run_blocks else "skip"


def _step_from_text(layout: Layout, index: int, line: str | Sequence[str]) -> StepPlan:
    codes = str(line).split()
    skip = codes[:1] == ["skip"]
    if codes == ["skip"]:
        return skip_step(layout)
    try:
        return StepPlan(layout, tuple(Action.from_code(code) for code in codes[skip:]), skip)
    except ScheduleError as error:
        raise ScheduleError(f"steps[{index}]: {error}") from None
