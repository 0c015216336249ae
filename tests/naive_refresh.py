"""The definition of every cached step, for tests: the originals of the benchmarks, in float64."""

import copy
import sys
from pathlib import Path

import torch
from hosts import inputs
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.originals import Original
from fastcache.models import DiT
from fastcache.schedule import Schedule


@torch.no_grad()
def run_naively(
    model: DiT, schedule: Schedule, batch: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Outputs of every step. The engine takes no part, and the model is a copy."""
    model, outputs = copy.deepcopy(model).to(dtype), []
    with Original(model, schedule) as original:
        for original.step in range(schedule.num_steps):
            x, t, y = inputs(original.step, batch)
            outputs.append(model(x.to(dtype), t.to(dtype), y))
    return outputs
