"""What ToCa and DuCa share: full steps, and between them steps that refresh a few tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from fastcache.plan.actions import COMPUTE, REUSE, Action, refresh
from fastcache.plan.layout import Branch, Layout
from fastcache.plan.schedule import Schedule
from fastcache.plan.selection import Score, Selection
from fastcache.plan.step import StepPlan
from fastcache.policies.base import Policy, positive_steps
from fastcache.policies.fresh_ratio import Position
from fastcache.policies.reference import plan_flops
from fastcache.policies.token_rules import TokenRules
from fastcache.policies.token_steps import PARTIAL, TokenStep

FLUX_SCORES = ("k-norm", "v-norm")
WITH_FORMULA = "DiT"


@dataclass(frozen=True)
class TokenRefresh(Policy):
    """Base of ToCa and DuCa.

    fresh_threshold: base interval N between full steps. fresh_ratio: base share of tokens that a
    partial step refreshes; 0 refreshes none and keeps the interval constant. cache_type: how tokens
    are scored (`Score`). ratio_scheduler: how the share changes over steps and layers.
    soft_fresh_weight: what a token's score gains over fresh_threshold partial steps that leave it out.
    force_fresh: "global". The authors' "local" was to refresh a token when its own age reaches the
    threshold, which they never finished; what their code does with it needs reproduce_reference.
    reproduce_reference: decide on a step's kind anew after its first block, as the originals do,
    which makes some full steps partial or skipped from block 1 on. Published FLOPs contain that.
    """

    RULES: ClassVar[Mapping[str, TokenRules]]

    fresh_threshold: int = 4
    fresh_ratio: float = 0.07
    cache_type: str = "attention"
    ratio_scheduler: str = "ToCa"
    soft_fresh_weight: float = 0.25
    force_fresh: str = "global"
    reproduce_reference: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.fresh_threshold, bool)
            or not isinstance(self.fresh_threshold, int)
            or self.fresh_threshold < 1
        ):
            raise ValueError(
                f"fresh_threshold: expected a whole number of steps >= 1, got {self.fresh_threshold!r}"
            )
        if not _is_number(self.fresh_ratio) or not 0 <= self.fresh_ratio <= 1:
            raise ValueError(f"fresh_ratio: expected a share of tokens in 0..1, got {self.fresh_ratio!r}")
        if not _is_number(self.soft_fresh_weight) or self.soft_fresh_weight < 0:
            raise ValueError(
                f"soft_fresh_weight: expected a number >= 0 (0 ignores ages), got {self.soft_fresh_weight!r}"
            )
        if not isinstance(self.reproduce_reference, bool):
            raise ValueError(f"reproduce_reference: expected True or False, got {self.reproduce_reference!r}")
        self._check_cache_type()
        self._check_scheduler_name()
        self._check_force_fresh()

    def rules(self, layout: Layout) -> TokenRules:
        """The rules for this host; ValueError if there are none or the settings do not go with it."""
        method = type(self).__name__
        if layout.family not in self.RULES:
            raise ValueError(
                f"layout.family: {method} has rules for {', '.join(self.RULES)}, got {layout.family!r}"
            )
        rules = self.RULES[layout.family]
        rules.check(layout)
        if self.ratio_scheduler not in rules.ratios:
            own = " or ".join(repr(name) for name in rules.ratios if name.startswith("ToCa"))
            raise ValueError(
                f"ratio_scheduler: expected one of {', '.join(rules.ratios)} for {method} on {layout.family}"
                f" (its authors use {own}), got {self.ratio_scheduler!r}"
            )
        if self.force_fresh == "local" and rules.local is None:
            raise ValueError(
                f"force_fresh: expected 'global', got 'local', with which the original {method} does not run"
                f" on {layout.family}"
            )
        return rules

    def schedule(self, num_steps: int, layout: Layout) -> Schedule:
        rules, num_steps = self.rules(layout), positive_steps(num_steps)
        steps: list[StepPlan] = []
        equal: dict[object, StepPlan] = {}  # steps that do the same are one object
        for k, step in enumerate(self._steps(rules, num_steps)):
            tokens = self._tokens(rules, layout, k, num_steps, step)
            key = (step, tuple(tokens.values()))
            if key not in equal:
                equal[key] = self._plan(rules, layout, step, tokens)
            steps.append(equal[key])
        return Schedule(layout, tuple(steps), type(self).__name__, self.fields(), self._selection(rules))

    def reference_flops(self, num_steps: int, layout: Layout, batch: int) -> int:
        if layout.family != WITH_FORMULA:
            raise NotImplementedError(
                f"{type(self).__name__} has an authors' FLOP formula for {WITH_FORMULA} alone, got"
                f" {layout.family}"
            )
        return plan_flops(self.schedule(num_steps, layout), batch)

    def _steps(self, rules: TokenRules, num_steps: int) -> list[TokenStep]:
        if self.force_fresh == "local" and rules.local == "first only":
            return [TokenStep(full=frozenset(rules.branches)), *[PARTIAL] * (num_steps - 1)]
        return rules.cycle.steps(
            self.fresh_threshold,
            num_steps,
            rules.branches,
            adapt=self.fresh_ratio != 0,
            flips=self.reproduce_reference,
        )

    def _tokens(
        self, rules: TokenRules, layout: Layout, k: int, num_steps: int, step: TokenStep
    ) -> dict[str, tuple[int, ...]]:
        """Tokens that each layer refreshes, by branch name, of those that the step does not compute."""
        refreshed = [] if step.skip else sorted(rules.refreshed - step.full)
        if not refreshed:
            return {}
        layers = layout.depth // rules.blocks_per_layer
        at = Position(rules.cycle.numbered(k, num_steps), num_steps, self.fresh_threshold, layers)
        ratio = rules.ratios[self.ratio_scheduler]
        return {name: ratio.tokens(self.fresh_ratio, at, name, layout.tokens) for name in refreshed}

    def _plan(
        self, rules: TokenRules, layout: Layout, step: TokenStep, tokens: Mapping[str, tuple[int, ...]]
    ) -> StepPlan:
        def action(branch: Branch) -> Action:
            if step.computes(branch.block, branch.name):
                return COMPUTE
            if branch.name not in tokens:
                return REUSE
            # no tokens is still a refresh: ages advance
            return refresh(tokens[branch.name][branch.block // rules.blocks_per_layer])

        return StepPlan(layout, tuple(map(action, layout.branches)), step.skip)

    def _selection(self, rules: TokenRules) -> Selection:
        age_weight = self.soft_fresh_weight / self.fresh_threshold if self.force_fresh == "global" else 0.0
        return Selection(Score(self.cache_type), age_weight, rules.cell, rules.bonus)

    def _check_cache_type(self) -> None:
        known = [score.value for score in Score]
        if self.cache_type not in known:
            hint = (
                " (a score of FLUX, which has no rules here; 'kv-norm' is the one of the other hosts)"
                if self.cache_type in FLUX_SCORES
                else ""
            )
            raise ValueError(f"cache_type: expected one of {', '.join(known)}, got {self.cache_type!r}{hint}")

    def _check_scheduler_name(self) -> None:
        known = list(dict.fromkeys(name for rules in self.RULES.values() for name in rules.ratios))
        if self.ratio_scheduler == "cosine":
            raise ValueError(
                "ratio_scheduler: 'cosine' is a choice of the originals that they never implemented,"
                f" expected one of {', '.join(known)}"
            )
        if self.ratio_scheduler not in known:
            raise ValueError(
                f"ratio_scheduler: expected one of {', '.join(known)}, got {self.ratio_scheduler!r}"
            )

    def _check_force_fresh(self) -> None:
        if self.force_fresh == "local" and not self.reproduce_reference:
            raise ValueError(
                "force_fresh: expected 'global', got 'local': refreshing a token when its own age reaches the"
                " threshold was never finished by the authors. For steps as with 'global' and ages ignored"
                " set soft_fresh_weight=0; for what their code does with 'local' set reproduce_reference=True"
            )
        if self.force_fresh not in ("global", "local"):
            raise ValueError(
                "force_fresh: expected 'global' (or 'local' with reproduce_reference=True), got"
                f" {self.force_fresh!r}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
