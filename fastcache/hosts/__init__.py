"""Adapters: how the blocks of a host model are lists of residual branches."""

from torch import nn

from fastcache.errors import HostError
from fastcache.hosts.base import GateProjection, Host, HostBranch, unknown_model
from fastcache.hosts.dit import DiTHost
from fastcache.hosts.norms import FusedNorm, fused_norm
from fastcache.hosts.proof import Proof

HOSTS: tuple[type[Host], ...] = (DiTHost,)


def recognise(model: nn.Module) -> Host:
    """The adapter of a model. Raises HostError naming what was looked for."""
    if hasattr(model, "_orig_mod"):
        raise HostError(
            "model: this is a torch.compile wrapper; pass the model itself and use accelerate(...,"
            " compile=True), which compiles the branch bodies"
        )
    reasons = {host.family: host.missing(model) for host in HOSTS}
    for host in HOSTS:
        if not reasons[host.family]:
            return host(model)
    raise unknown_model(model, reasons)


__all__ = ["HOSTS", "FusedNorm", "GateProjection", "Host", "HostBranch", "Proof", "fused_norm", "recognise"]
