"""The modulation table: shifts, scales and gates of every step, computed once per generation.

They depend on timestep and condition only. Where both are known before the first step, the host's
own modules run once with all steps as the batch, and later steps only index the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.errors import SessionError
from fastcache.hosts import Host

CHUNK_BYTES = 32 << 20  # most that one call of a host's modulation module may return


@dataclass(frozen=True)
class ModulationTable:
    """vectors: [S, L * V, B, D], row V * block + v; first: condition [B, D] of the first step."""

    vectors: Tensor
    first: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.vectors.numel() * self.vectors.element_size()

    def verify(self, condition: Tensor) -> None:
        """Raise SessionError if the first step's condition is not the one that was announced."""
        if condition.shape != self.first.shape or not torch.allclose(
            condition.float(), self.first.float(), rtol=1e-2, atol=1e-3
        ):
            raise SessionError(
                "begin: the timesteps or conditions that were announced are not those that the model was"
                " called with; pass what the model gets (t at each step, y of the whole CFG batch), or begin"
                " without them"
            )


@torch.no_grad()
def build_table(host: Host, timesteps: Tensor, conditions: dict[str, Tensor]) -> ModulationTable:
    """Run the host's embedders and modulation modules over all steps, chunk by chunk."""
    condition = host.step_conditions(timesteps, conditions)  # [S, B, D]
    S, B = condition.shape[:2]
    vectors: Tensor | None = None
    for index, block in enumerate(host.blocks):
        per_step = B * host.vectors * condition.shape[-1] * condition.element_size()
        stride = max(1, CHUNK_BYTES // max(1, per_step))
        for start in range(0, S, stride):
            some = condition[start : start + stride]
            part = host.modulation(block, some.flatten(0, 1)).unflatten(0, some.shape[:2])  # [s, B, V, D]
            if vectors is None:
                vectors = part.new_empty(S, len(host.blocks) * host.vectors, B, part.shape[-1])
            vectors[start : start + stride, index * host.vectors : (index + 1) * host.vectors] = (
                part.transpose(1, 2)
            )
    return ModulationTable(vectors, condition[0].clone())


def checked_timesteps(timesteps: Tensor, num_steps: int) -> Tensor:
    """Timesteps as [S], one per step of the plan."""
    timesteps = torch.as_tensor(timesteps)
    if timesteps.ndim != 1 or timesteps.shape[0] != num_steps:
        raise SessionError(f"timesteps: expected [{num_steps}], one per step, got {list(timesteps.shape)}")
    return timesteps
