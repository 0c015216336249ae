"""Recorded runs of the original implementations on a small seeded DiT (CPU, float32).

Each case holds the exact input and output of every model call; feed them in order and compare.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from golden.weights import fill_model
from safetensors import safe_open
from torch import Tensor

from fastcache.models import DiT

FOLDER = Path(__file__).parent / "golden"
CFG_SCALE = 1.5
NULL_LABEL = 10
TOLERANCE = 1e-5  # relative L2, each step


@dataclass(frozen=True)
class GoldenCall:
    """One call of `forward_with_cfg(x, t, y, CFG_SCALE)` and its recorded output."""

    step: int
    x: Tensor  # [4, 4, 16, 16]
    t: Tensor  # [4]
    y: Tensor  # [4], ordered [classes, null, null]
    out: Tensor  # [4, 8, 16, 16]


@dataclass(frozen=True)
class GoldenCase:
    """One trajectory of S steps; `config` has the original's flags, `actions` one letter per layer and
    step.
    """

    inputs: Tensor  # [S, 2, 4, 16, 16]
    timesteps: Tensor  # [S]
    labels: Tensor  # [2]
    model_out: Tensor  # [S, 4, 8, 16, 16]
    config: dict[str, object]
    actions: list[str] | None

    def calls(self) -> Iterator[GoldenCall]:
        """The model calls in the order of the run."""
        y = torch.cat([self.labels, torch.full_like(self.labels, NULL_LABEL)])
        for step, (half, t, out) in enumerate(zip(self.inputs, self.timesteps, self.model_out, strict=True)):
            yield GoldenCall(step, torch.cat([half, half]), t.expand(4), y, out)


def golden_model() -> DiT:
    """The model of every DiT case, freshly filled from its own state-dict names."""
    model = DiT(
        input_size=16, patch_size=2, in_channels=4, hidden_size=64, depth=28, num_heads=4, num_classes=10
    )
    return fill_model(model).eval()


@cache
def load_case(name: str) -> GoldenCase:
    """The case `tests/golden/{name}.safetensors`, for example "dit_uncached"."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in ("inputs", "timesteps", "labels", "model_out")}
        metadata = file.metadata()
    return GoldenCase(
        **tensors, config=json.loads(metadata["config"]), actions=json.loads(metadata["actions"])
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@dataclass(frozen=True)
class GoldenActions:
    """What an original did at every step: DiT, a letter per layer (F, P, A); PixArt, per layer ["full"],
    ["partial", K of cross, K of mlp] or ["skip"]; STDiT3, per layer [spatial, temporal] lists of "full",
    "reuse", "skip" or K, for attn, cross and mlp.
    """

    method: str  # ToCa or DuCa
    family: str
    tokens: int
    fields: dict[str, object]
    actions: list


@cache
def load_actions() -> dict[str, GoldenActions]:
    """The cases of `tests/golden/token_actions.json`, all with 28 layers."""
    return {
        name: GoldenActions(**case)
        for name, case in json.loads((FOLDER / "token_actions.json").read_text()).items()
    }
