"""A host's description, proven on the host itself: one block of each structure is run both ways.

What an adapter says of a block (norm, modulation, body, gate, one branch after the other) is compared
with what the block's own forward computes from the same input, in the host's dtype. So a block that
scales its branches, runs them side by side or has another norm is an error and not a wrong picture.
The proof runs aside: no hook of a module and no dispatch mode sees it, the random state stays as it
was, and the model's outputs are not touched.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastcache.backends.constants import capturing
from fastcache.errors import HostError
from fastcache.hosts.base import Host

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EXACT = 1e-3  # relative error of a block's update that float32 explains (tensor cores in TF32 too)
ROUNDED = 0.03  # of 16-bit types, and under autocast


class Proof:
    """Which structures of blocks are proven, and which proved nothing because their gates were zero."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._proven: set[tuple[Any, ...]] = set()
        self.unproven = 0

    def lacks(self, block: nn.Module) -> bool:
        """True if no block of this structure was proven yet."""
        return structure_of(block) not in self._proven

    def require(
        self,
        number: int,
        block: nn.Module,
        original: Callable[..., Any],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """HostError if the block is not what its description says. Reads the device once a structure."""
        if capturing(x.device):
            return
        self._proven.add(structure_of(block))
        with aside(self._host.model, x.device):
            update, difference, size = (
                float(norm) for norm in self._both_ways(number, block, original, x, args, kwargs)
            )
        if update == 0.0 and difference == 0.0:
            self.unproven += 1
            return
        autocast = torch.is_autocast_enabled(x.device.type)
        exact = x.dtype in (torch.float32, torch.float64) and not autocast
        rounding = 4 * torch.finfo(torch.bfloat16 if autocast else x.dtype).eps * size
        if not difference <= (EXACT if exact else ROUNDED) * update + rounding:
            raise HostError(
                f"blocks[{number}] ({type(block).__name__}) is not computed as a {self._host.family} block"
                f" is: run by its parts ({', '.join(branch.name for branch in self._host.branches(block))},"
                " one after the other, each x + gate * body(norm(x) * (1 + scale) + shift)) its update"
                f" differs by {difference / max(update, 1e-30):.2g} of its size from that of its own"
                " forward. Write an adapter for it (fastcache/hosts/dit.py is one) and pass host=, or pass"
                " prove=False if you know why that is right"
            )

    def _both_ways(
        self,
        number: int,
        block: nn.Module,
        original: Callable[..., Any],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, condition = self._host.block_inputs(args, kwargs)
        state = RandomState(x.device)
        given = x.clone()
        expected = original(*_with(args, given), **_with(kwargs, given))
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            raise HostError(
                f"blocks[{number}] ({type(block).__name__}): expected its forward to return one tensor"
                f" {list(x.shape)}, got {_told(expected)}"
            )
        state.restore()
        found = self._by_parts(block, x.clone(), condition)
        state.restore()
        expected, found = expected.double(), found.double()
        return (expected - x).norm(), (expected - found).norm(), expected.norm()

    def _by_parts(self, block: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
        vectors = self._host.modulation(block, condition)[:, :, None]
        for branch in self._host.branches(block):
            h = branch.norm(x)
            if branch.scale is not None:
                h = h * (1 + vectors[:, branch.scale])
            if branch.shift is not None:
                h = h + vectors[:, branch.shift]
            try:
                feature = branch.body(h)
            except TypeError as error:
                raise HostError(
                    f"{type(block).__name__}.{branch.name}: its forward does not take one tensor [B, N, D]:"
                    f" {error}"
                ) from error
            if not isinstance(feature, Tensor) or feature.shape != x.shape:
                raise HostError(
                    f"{type(block).__name__}.{branch.name}: expected one tensor {list(x.shape)}, got"
                    f" {_told(feature)}"
                )
            x = x + (feature if branch.gate is None else vectors[:, branch.gate] * feature)
        return x


class RandomState:
    """The random state of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """As it was."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextlib.contextmanager
def aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without hooks of the model's modules, without gradients, and outside of dispatch modes."""
    hooks = [(m, name, m.__dict__[name]) for m in model.modules() for name in HOOKS if m.__dict__.get(name)]
    with _disable_current_modes(), torch.no_grad():
        try:
            for module, name, registered in hooks:
                module.__dict__[name] = type(registered)()
            yield
        finally:
            for module, name, registered in hooks:
                module.__dict__[name] = registered


def structure_of(block: nn.Module) -> tuple[Any, ...]:
    """What makes blocks compute alike, weights apart: types, forwards of instances, plain attributes."""
    return tuple(
        (name, type(module), _own_forward(module), *_numbers(module))
        for name, module in block.named_modules()
    )


def _own_forward(module: nn.Module) -> Any:
    forward = module.__dict__.get("forward")
    forward = getattr(forward, "original", forward)  # ours stands before it while the model is accelerated
    function = getattr(forward, "__func__", forward)
    return None if function is type(module).forward else function


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in module.__dict__.items():
        if type(value) in (int, float, bool, str):
            yield name, value


def _with(given: Any, x: Tensor) -> Any:
    """Arguments in which the stream (their first tensor, or `x`) is this tensor."""
    if isinstance(given, dict):
        return {**given, "x": x} if "x" in given else given
    return (x, *given[1:]) if given else given


def _told(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
