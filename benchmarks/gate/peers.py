"""Kernels of other projects beside ours, from files that an environment variable names. None of them is kept
here.

    FASTCACHE_PEER_SGLANG    scale_residual_norm_scale_shift_triton.py of SGLang: update and LayerNorm, one
    sample FASTCACHE_PEER_FASTVIDEO modulation.py of FastVideo's minimax_h3_fusions: update and RMSNorm
    modulate FASTCACHE_PEER_LIGER     liger_kernel's wheel or folder: RMSNorm modulate

Calls were written from the signatures that these projects document and have not run here; a peer whose call
or values do not fit is absent with the reason.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.cases import Form
from benchmarks.contest import AnyCase
from benchmarks.operands import Operands

EPS = 1e-6


@dataclass(frozen=True)
class Peer:
    """A kernel of another project. bind(module, operands): a call that returns the form's outputs."""

    name: str
    variable: str
    form: Form
    bind: Callable[[ModuleType, Operands], Callable[[], tuple]]
    one_sample: bool = False

    def absence(self, case: AnyCase) -> str:
        """Why the peer takes no part in a case, "" if it does."""
        path = os.environ.get(self.variable, "")
        if case.label != self.form.value:
            return f"has no kernel for {case.label}"
        if not path:
            return f"{self.variable} names no file"
        if not Path(path).exists():
            return f"{self.variable}: there is no such file"
        return "takes one sample only" if self.one_sample and case.size.batch != 1 else ""

    def module(self) -> ModuleType:
        """What the variable names; a wheel or folder goes to the front of the path."""
        path = Path(os.environ[self.variable])
        if path.suffix != ".py":
            sys.path.insert(0, str(path))
            return importlib.import_module("liger_kernel.transformers.functional")
        spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def sglang(module: ModuleType, i: Operands) -> Callable[[], tuple]:
    """It returns (h, x')."""
    vectors = {name: getattr(i, name)[:, None] for name in ("gate", "shift", "scale")}
    named = {"residual": i.x, "x": i.features[0], **vectors, "weight": None, "bias": None, "eps": EPS}
    return lambda: module.fused_scale_residual_norm_scale_shift_triton(**named)[::-1]


def fastvideo(module: ModuleType, i: Operands) -> Callable[[], tuple]:
    """Flat rows, a weight of ones, tables [B, D] and the sample of every row; it returns (h, x')."""
    batch, tokens, channels = i.x.shape
    index = torch.arange(batch, device=i.x.device).repeat_interleave(tokens)
    rows = i.x.view(-1, channels), i.features[0].view(-1, channels)
    given = (*rows, i.gate, torch.ones_like(i.gate[0]), i.scale, i.shift, index, EPS)

    def call() -> tuple:
        h, updated = module.fused_residual_gate_rmsnorm_modulate(*given)
        return updated.view_as(i.x), h.view_as(i.x)

    return call


def liger(module: ModuleType, i: Operands) -> Callable[[], tuple]:
    """With a weight of ones."""
    weight, scale, shift = torch.ones_like(i.gate[0]), i.scale[:, None], i.shift[:, None]
    return lambda: (module.liger_modulated_rms_norm(i.x, weight, scale, shift, EPS),)


PEERS = (
    Peer("sglang triton", "FASTCACHE_PEER_SGLANG", Form.UPDATE_MODULATE, sglang, one_sample=True),
    Peer("fastvideo triton", "FASTCACHE_PEER_FASTVIDEO", Form.UPDATE_MODULATE_RMS, fastvideo),
    Peer("liger triton", "FASTCACHE_PEER_LIGER", Form.MODULATE_RMS, liger),
)
