"""Announced modulations: shifts, scales and gates of every step, computed once per generation.

They depend on timestep and condition only. Where both are known before the first step, the host's
own modules run once with all steps as the batch, and later steps only index the result. What was
announced is compared with what the model gets, at every step: timesteps that are on the host at
once, conditions on the device, by one operator a step, which is read when the session closes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.engine.calls import HostTime, Time
from fastcache.engine.device_check import Claim, DeviceCheck
from fastcache.errors import SessionError
from fastcache.hosts import Host
from fastcache.ops import relative_error

CHUNK_BYTES = 32 << 20  # most that one call of a host's modulation module may return
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative error of a condition; 16 bits: 0.03


@dataclass(frozen=True)
class ModulationTable:
    """vectors: [S, L * V, B, D], row V * block + v; conditions: [S, B, D]."""

    vectors: Tensor
    conditions: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.vectors.numel() * self.vectors.element_size()


class Announcement:
    """What `Session.begin` was told of a generation, and the table that follows from it."""

    def __init__(self, host: Host, timesteps: Tensor, conditions: dict[str, Tensor]) -> None:
        self._host, self._timesteps, self._conditions = host, timesteps, conditions
        on_host = timesteps.device.type == "cpu"
        self._times: list[HostTime] | None = [float(t) for t in timesteps.tolist()] if on_host else None
        self._circumstances = circumstances(host)
        self._make()
        self._rows: dict[torch.device, Tensor] = {}
        self._step = -1

    def refresh(self, check: DeviceCheck) -> None:
        """The generation begins: the table is made again if weights or autocast are no longer as they
        were."""
        now = circumstances(self._host)
        if now != self._circumstances:
            self._circumstances = now
            self._make()
            return
        weights = fingerprint(self._host)
        if self._weights is not None and weights is not None:
            check.note(Claim.WEIGHTS, 0, (weights - self._weights).abs() / self._weights, 1e-6)

    def _make(self) -> None:
        self.table = build_table(self._host, self._timesteps, self._conditions)
        self._weights = fingerprint(self._host)

    def require_time(self, step: int, t: object) -> None:
        """SessionError if t, where it is on the host, is not what was announced for this step."""
        found = Time.of(t).host
        if self._times is None or found is None:
            return
        expected = self._times[step]
        if found != expected and not _close(found, expected):
            raise SessionError(
                "begin: the timesteps or conditions that were announced are not those that the model is"
                f" called with: step {step} was announced with t {expected:g}, the model got {found}. Pass"
                " what the model gets (t at each step), or begin without them"
            )

    def error(self, step: int, condition: Tensor) -> Tensor:
        """[1, 1]: relative error of a step's announced condition against the one that blocks get."""
        expected = self.table.conditions[step]
        if condition.shape != expected.shape:
            raise SessionError(
                f"begin: conditions were announced for shape {list(expected.shape)}, the model's blocks get"
                f" {list(condition.shape)}; announce the whole batch that the model is called with (both"
                " halves of guidance), and begin again where it changes"
            )
        found = condition.detach().to(expected.device, expected.dtype)
        return relative_error([expected[:, None]], [found[:, None]])

    @property
    def tolerance(self) -> float:
        """Largest relative error of a condition that rounding explains."""
        return TOLERANCES.get(self.table.conditions.dtype, 0.03)

    def rows(self, step: int, device: torch.device) -> Tensor:
        """[L * V, B, D] of a step; one tensor for all blocks of a device, so that their gates are packed."""
        if step != self._step:
            self._step, self._rows = step, {}
        if device not in self._rows:
            self._rows[device] = self.table.vectors[step].to(device)
        return self._rows[device]


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
            place = slice(index * host.vectors, (index + 1) * host.vectors)
            vectors[start : start + stride, place] = part.transpose(1, 2)
    if vectors is None:
        raise SessionError("begin: the model has no blocks whose modulations could be computed")
    return ModulationTable(vectors, condition.clone())


def checked_timesteps(timesteps: Tensor, num_steps: int) -> Tensor:
    """Timesteps as [S], one per step of the plan."""
    timesteps = torch.as_tensor(timesteps)
    if timesteps.ndim != 1 or timesteps.shape[0] != num_steps:
        raise SessionError(f"timesteps: expected [{num_steps}], one per step, got {list(timesteps.shape)}")
    return timesteps


def circumstances(host: Host) -> tuple[Any, ...]:
    """What a table depends on besides its arguments: autocast, and the weights of the modulations."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    autocast = tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in devices)
    return autocast, tuple(_state(module) for module in host.modulators())


@torch.no_grad()
def fingerprint(host: Host) -> Tensor | None:
    """Norms of the weights that modulations come from, on the device; None where they are elsewhere.

    Counters of writes do not see everything (`weight.data.mul_()`).
    """
    weights = [p for module in host.modulators() for p in module.parameters() if p.is_floating_point()]
    if not weights or any(p.device != weights[0].device or p.is_meta for p in weights):
        return None
    return torch.stack([norm.float() for norm in torch._foreach_norm([p.detach() for p in weights])]).sum()[
        None
    ]


def _state(module: nn.Module) -> tuple[Any, ...]:
    return tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in module.parameters())


def _close(found: HostTime, expected: HostTime) -> bool:
    """Equal up to the rounding of 16-bit timesteps."""
    if not isinstance(found, float) or not isinstance(expected, float):
        return False
    return abs(found - expected) <= 4e-3 * max(abs(found), abs(expected))
