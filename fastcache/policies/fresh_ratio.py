"""How many tokens a partial step refreshes: the fresh-ratio schedules of ToCa and DuCa.

Method: docs/methods/toca.md, "How many tokens".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """A factor that changes linearly: start + slope * position / length."""

    start: float = 1.0
    slope: float = 0.0

    def at(self, position: Any, length: int) -> Any:
        """The factor at `position`, or at each of an array of them, of 0..length."""
        return self.start + self.slope * position / length


@dataclass(frozen=True)
class FreshRatio:
    """The share of tokens that is refreshed, as fresh_ratio times factors of step, layer and branch.

    step, with `decay` ** (step / num_steps) and, `ripple` wide, a ramp over the steps of an interval.
    layer: over layer / (layers - 1). The originals divide by 27 whatever the depth, which is the
    same for the 28 layers of every model they publish results of.
    branches: factor by branch name, one for branches without.
    """

    step: Line = Line()
    layer: Line = Line()
    branches: Mapping[str, float] = field(default_factory=dict)
    decay: float = 1.0
    ripple: float = 0.0

    def tokens(self, fresh_ratio: float, at: "Position", branch: str, tokens: int) -> tuple[int, ...]:
        """K of every layer: the share of `tokens`, in float32 as the originals have it, rounded down.

        Before it is clamped to 0..1 the share is negative in places with some schedules.
        """
        ramp = self.ripple * (at.step % at.interval / at.interval - 0.5)
        step = self.step.at(at.step, at.num_steps) * self.decay ** (at.step / at.num_steps) + ramp
        layers = self.layer.at(np.arange(at.layers, dtype=np.float64), max(1, at.layers - 1))
        share = fresh_ratio * layers * step * self.branches.get(branch, 1.0)
        clamped = np.minimum(np.maximum(share, 0.0), 1.0).astype(np.float32)
        return tuple((clamped * np.float32(tokens)).astype(int).tolist())


@dataclass(frozen=True)
class Position:
    """Where in a generation a ratio is asked for. `step` is numbered as the host's sampler does."""

    step: int
    num_steps: int
    interval: int
    layers: int


# for every host
GENERAL: Mapping[str, FreshRatio] = {
    "constant": FreshRatio(),
    "linear": FreshRatio(step=Line(1.9, -1.8)),
    "exp": FreshRatio(decay=0.9),
    "linear-mode": FreshRatio(step=Line(1.9, -1.8), ripple=0.1),
    "layerwise": FreshRatio(layer=Line(1.9, -1.8)),
}
# made for one host and sampler
DIT_DDIM50 = FreshRatio(Line(3.0, -4.0), Line(0.8, 0.4), {"mlp": 2.5})
DIT_DDPM250 = FreshRatio(Line(1.4, -0.8), Line(1.8, -1.6), {"mlp": 2.5})
PIXART = FreshRatio(Line(1.9, -1.8), Line(1.6, -1.2), {"mlp": 1.6, "cross": 0.6})
OPEN_SORA = FreshRatio(branches={"mlp": 1.495, "cross": -0.005})
