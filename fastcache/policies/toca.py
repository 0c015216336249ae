"""ToCa: between full steps refresh the tokens that matter most, layer by layer (docs/methods/toca.md)."""

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
    cycle=AdaptiveCycle(descending=True, pace=Line(1.4, -0.8), sensitive=(0.2, 0.4)),
    ratios={
        **GENERAL,
        "ToCa-ddim50": DIT_DDIM50,
        "ToCa-ddpm250": DIT_DDPM250,
        "linear-layerwise": DIT_DDPM250,
    },
    cell=2,
    bonus=0.6,
    local="as global",
)
PIXART_ALPHA = TokenRules(
    branches=("attn", "cross", "mlp"),
    refreshed=frozenset({"cross", "mlp"}),
    cycle=AdaptiveCycle(descending=False, pace=Line(0.8, 0.4)),
    ratios={**GENERAL, "ToCa": PIXART, "linear-layerwise": PIXART},
    cell=4,
    bonus=0.4,
    local="first only",
)
STDIT3 = TokenRules(
    branches=("attn", "cross", "mlp"),
    refreshed=frozenset({"cross", "mlp"}),
    cycle=ModuleCycle({"attn": 3, "cross": 6, "mlp": 3}, warmup=3),
    ratios={**GENERAL, "ToCa": OPEN_SORA},
    blocks_per_layer=2,
)


@dataclass(frozen=True)
class ToCa(TokenRefresh):
    """Full and partial steps; a partial step reuses attention and refreshes K tokens of the MLP.

    Fields as in `TokenRefresh`. On DiT and PixArt-alpha the interval shrinks as sampling goes on; on
    Open-Sora the intervals are fixed (attention and MLP 3, cross-attention 6) and fresh_threshold
    only divides soft_fresh_weight.
    Source: Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching".
    """

    RULES: ClassVar[Mapping[str, TokenRules]] = {"DiT": DIT, "PixArt": PIXART_ALPHA, "STDiT3": STDIT3}

    ratio_scheduler: str = "ToCa-ddim50"
