"""DuCa: between full steps, steps that refresh tokens and steps that skip the trunk take turns.

Method: docs/methods/duca.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastcache.policies.fresh_ratio import DIT_DDIM50, DIT_DDPM250, GENERAL, OPEN_SORA, PIXART, Line
from fastcache.policies.token_refresh import TokenRefresh
from fastcache.policies.token_rules import TokenRules
from fastcache.policies.token_steps import AdaptiveCycle, ModuleCycle

DIT = TokenRules(
    branches=("attn", "mlp"),
    refreshed=frozenset({"mlp"}),
    cycle=AdaptiveCycle(descending=True, pace=Line(1.4, -0.8), sensitive=(0.2, 0.4), alternate=True),
    ratios={**GENERAL, "ToCa": DIT_DDIM50, "linear-layerwise": DIT_DDPM250},
    cell=2,
    bonus=0.8,
    local="as global",
)
PIXART_ALPHA = TokenRules(
    branches=("attn", "cross", "mlp"),
    refreshed=frozenset({"cross", "mlp"}),
    cycle=AdaptiveCycle(descending=False, pace=Line(), alternate=True),
    ratios={**GENERAL, "ToCa": PIXART, "linear-layerwise": PIXART},
    cell=4,
    bonus=0.4,
)
STDIT3 = TokenRules(
    branches=("attn", "cross", "mlp"),
    refreshed=frozenset({"mlp"}),
    cycle=ModuleCycle({"attn": 3, "cross": 6, "mlp": 3}, warmup=3, skipped=2),
    ratios={**GENERAL, "ToCa": OPEN_SORA},
    blocks_per_layer=2,
)


@dataclass(frozen=True)
class DuCa(TokenRefresh):
    """Full, partial and skipped steps; a partial step is ToCa's, a skipped one has the last trunk output.

    Fields as in `TokenRefresh`. On DiT steps are numbered downwards, so that with an odd interval
    the skipped step comes first after a full one; on PixArt-alpha the partial one does. On Open-Sora
    every third step is skipped whatever fresh_threshold is.
    Source: Zou et al., "Accelerating Diffusion Transformers with Dual Feature Caching".
    """

    RULES: ClassVar[Mapping[str, TokenRules]] = {"DiT": DIT, "PixArt": PIXART_ALPHA, "STDiT3": STDIT3}
