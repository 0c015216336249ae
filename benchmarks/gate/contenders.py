"""Who takes part in a case on a GPU: the host's sequence, eager at its best, torch.compile twice, ours twice, and peers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

import fastcache
from benchmarks.cases import Case
from benchmarks.gate.peers import PEERS
from benchmarks.host_sequences import HOST_SEQUENCES
from benchmarks.providers import OURS, Binder, Provider, binder

NAIVE, BEST = Provider.NAIVE.value, Provider.BEST_EAGER.value
COMPILED, AUTOTUNED = "torch.compile", "torch.compile autotuned"
OURS_CUDA, OURS_TRITON = "fastcache cuda", "fastcache triton"
COMPILE_MODES = {COMPILED: None, AUTOTUNED: "max-autotune-no-cudagraphs"}
OUR_BACKENDS = {OURS_CUDA: "cuda", OURS_TRITON: "triton"}
STAND_INS = {"cuda": "cpp", "triton": "eager"}  # in a dry run on a CPU; eager where cpp was not built


@dataclass(frozen=True)
class Contender:
    """bind: inputs to a call. scope: entered around everything that calls. may_fail: then it is absent with its error."""

    name: str
    bind: Binder
    scope: Callable[[], AbstractContextManager] = nullcontext
    may_fail: bool = False


def contenders(case: Case, device: torch.device, *, autotune: bool) -> tuple[list[Contender], dict[str, str]]:
    """(who takes part, who does not and why)."""
    torch.compiler.reset()  # a graph of this case alone: no recompile limit, no dynamic shapes
    found = [
        Contender(NAIVE, binder(Provider.NAIVE, case.form)),
        Contender(BEST, binder(Provider.BEST_EAGER, case.form)),
    ]
    found += [
        Contender(name, compiled(case, mode, device), may_fail=True)
        for name, mode in COMPILE_MODES.items()
        if autotune or name != AUTOTUNED
    ]
    absent = (
        {}
        if autotune
        else {AUTOTUNED: "left out at this size to save time; `--seconds kernels=450` has it everywhere"}
    )
    for name, backend in OUR_BACKENDS.items():
        status = fastcache.backends_status()
        if device.type != "cuda":
            backend = STAND_INS[backend] if status[STAND_INS[backend]].available else "eager"
        if status[backend].available:
            found.append(
                Contender(name, OURS[case.form], lambda backend=backend: fastcache.use_backend(backend))
            )
        else:
            absent[name] = status[backend].reason
    for peer in PEERS:
        reason = peer.absence(case)
        if reason:
            absent[peer.name] = reason
        else:
            found.append(Contender(peer.name, peer.binder(case), may_fail=True))
    return found, absent


def compiled(case: Case, mode: str | None, device: torch.device) -> Binder:
    """torch.compile of the host's sequence. In a dry run it is traced, and no code is made."""
    host = HOST_SEQUENCES[case.form]
    made = (
        torch.compile(host.naive, fullgraph=True, dynamic=False, mode=mode)
        if device.type == "cuda"
        else torch.compile(host.naive, fullgraph=True, dynamic=False, backend="eager")
    )

    def bind(inputs):
        arguments = host.arguments(inputs)
        return lambda: made(*arguments)

    return bind
