"""Bad indices that GPU kernels met: a sticky flag per device, read when somebody asks.

A kernel cannot raise, and reading an index on the host would wait for the GPU. So a kernel that meets
an index out of range writes nothing outside of its tensors, makes the result visible (a gate that
does not exist is NaN; a row or token that does not exist is left out; a count is clamped) and sets a bit. A
Session reads the bits when it closes; whoever calls the operators directly asks `take_index_errors`.
"""

import ctypes
import os
import weakref
from collections.abc import Iterable

import torch

from fastcache.backends.index_flags import FLAGS
from fastcache.backends.library import PACKAGE

# by bit: csrc/include/fastcache/cuda/parameters.h, tokens.h, fastcache/ops/slots.py
ARGUMENTS = {1: "gate_index", 2: "fresh_slots or row_slots", 4: "counts", 8: "index"}


def take_index_errors(device: torch.device) -> str:
    """Arguments in which kernels on `device` met bad indices since the last call, "" if none.

    Waits for the device and clears the flag. While a CUDA graph is captured nothing can be read: "",
    and the flag keeps its bits. What was met before a session was entered is kept for this question,
    what was met in it is told to the session.
    Raises RuntimeError if the device cannot be asked.
    """
    found = _OUTSIDE.take(device)
    return "" if found is None else named(found)


class IndexWatch:
    """The bad indices that kernels met between `open` and `close`, on any of the devices that were named.

    A device has one flag, whoever launched the kernel. So whoever reads it tells everybody who was
    watching: of two sessions that overlap on a device both learn of an error, and none takes it from
    the other.
    """

    def __init__(self) -> None:
        self._found: dict[torch.device, int] = {}

    def open(self, devices: Iterable[torch.device]) -> None:
        """Begin to watch: what is on the flags already belongs to those who watched before."""
        for device in map(_whole, devices):
            self.watch(device)
        _WATCHING.add(self)

    def watch(self, device: torch.device) -> None:
        """Watch one more device. Waits for it, the first time."""
        if device not in self._found:
            _OUTSIDE.read(device)
            self._found[device] = 0

    def add(self, device: torch.device) -> None:
        """Watch one more device, on which something has run already: nothing is read."""
        self._found.setdefault(_whole(device), 0)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Those that are watched."""
        return tuple(self._found)

    def take(self, device: torch.device) -> int | None:
        """Bits of one device since the last time, None if it cannot be read now. Waits for the device."""
        device = _whole(device)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        self.read(device)
        bits, self._found[device] = self._found.get(device, 0), 0
        return bits

    def close(self) -> None:
        """Watch no longer."""
        _WATCHING.discard(self)

    def read(self, device: torch.device) -> None:
        """Read and clear the flag of a device, and tell everybody who watches it. Waits for the device."""
        bits = _taken_from_cuda(device) | _taken_from_flag(device)
        for watch in {self, *_WATCHING} if bits else ():
            if watch is self or device in watch.devices:
                watch._found[device] = watch._found.get(device, 0) | bits


_WATCHING: "weakref.WeakSet[IndexWatch]" = weakref.WeakSet()
_OUTSIDE = IndexWatch()  # for callers of the operators, outside of sessions


def named(bits: int) -> str:
    """The arguments that bits stand for."""
    return " and ".join(name for bit, name in ARGUMENTS.items() if bits & bit)


def _whole(device: torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def explained(names: str, device: torch.device) -> str:
    """What to tell the user about `take_index_errors`."""
    return (
        f"{names}: a kernel on {device} met an index out of range. Nothing outside of the tensors was read or"
        " written, but results since are wrong: a gate that does not exist counts as NaN, a row or token"
        " that does not exist is left out, a count is clamped. On a CPU the call that does this raises"
        " IndexError"
    )


def _taken_from_cuda(device: torch.device) -> int:
    library = loaded_cuda() if device.type == "cuda" else None
    if library is None:
        return 0
    bits = library.fastcache_cuda_error_flag(device.index)
    if bits < 0:
        raise RuntimeError(
            f"device: the index-error flag of {device} cannot be read; an earlier CUDA error has probably"
            " made the device unusable in this process"
        )
    return bits


def _taken_from_flag(device: torch.device) -> int:
    flag = FLAGS.get(device)
    if flag is None:
        return 0
    bits = int(flag.item())
    flag.zero_()
    return bits


def loaded_cuda() -> ctypes.CDLL | None:
    """The compiled CUDA library if this process has loaded it."""
    try:
        return ctypes.CDLL(str(PACKAGE / "lib" / "libfastcache_cuda.so"), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
