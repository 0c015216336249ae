"""Small tensors of host values on a device (gate rows, weights, counts, addresses), and who keeps them.

A session is the owner of its constants: each is uploaded once on each stream that uses it, lives as
long as the session (and so as long as a CUDA graph that the session's user captured in it), and is
gone when it closes. Nothing is kept by the process: without an owner a constant is made anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Values = tuple[float, ...]
MOST = 8192  # constants that an owner keeps; schedules need a few for each step


class Constants:
    """Device tensors by (values, dtype, device), one for each stream that uses them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Values, torch.dtype, torch.device], dict[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        rows = [row for by_stream in self._kept.values() for row in by_stream.values()]
        return sum(row.numel() * row.element_size() for row in rows)

    def row(self, values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[len(values)] on the device."""
        by_stream = self._kept.get((values, dtype, device), {})
        if capturing(device):  # what a graph reads outlives every owner, and what it uploads is not there yet
            return held_by_graph(values, dtype, device, next(iter(by_stream.values()), None))
        stream = _stream_of(device)
        found = by_stream.get(stream)
        if found is None:
            found = made(values, dtype, device)
            if len(self._kept) >= MOST:  # steps that never repeat: begin anew
                self._kept.clear()
            self._kept.setdefault((values, dtype, device), {})[stream] = found
        return found

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Constants that are asked for in this context (thread or task) are these."""
        token = _OWNER.set(self)
        try:
            yield
        finally:
            _OWNER.reset(token)


_OWNER: ContextVar[Constants | None] = ContextVar("fastcache_constants", default=None)


def constant_row(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)] of host values on a device: the owner's, else a new one. Never waits for the device."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    owner = _OWNER.get()
    if owner is not None:
        return owner.row(values, dtype, device)
    return held_by_graph(values, dtype, device, None) if capturing(device) else made(values, dtype, device)


def made(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An upload that does not wait: from pinned memory."""
    with torch.inference_mode(False):
        row = torch.tensor(values, dtype=dtype)
        return row if device.type == "cpu" else row.pin_memory().to(device, non_blocking=True)


def held_by_graph(
    values: Values, dtype: torch.dtype, device: torch.device, uploaded: Tensor | None
) -> Tensor:
    """A constant for a CUDA graph that is being captured: kept for good, with the host memory it comes
    from."""
    if uploaded is None:
        with torch.inference_mode(False):
            source = torch.tensor(values, dtype=dtype).pin_memory()
            uploaded = source.to(device, non_blocking=True)  # recorded: each replay uploads it again
        CAPTURED.append(source)
    CAPTURED.append(uploaded)
    return uploaded


CAPTURED: list[Tensor] = []  # a few small tensors for every launch that was captured


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured: nothing can be read, and what is computed is not there yet."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
