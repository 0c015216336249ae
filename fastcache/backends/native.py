"""Calls of the registered operators from eager Python: the cpp and cuda backends.

The autograd key is skipped here because `fastcache.ops` has already refused inputs that need a
gradient; fake tensors, functionalisation and profilers still see the call.
"""

from typing import Any

import torch

_below_autograd = torch._C._AutoDispatchBelowAutograd
_update = torch.ops.fastcache.residual_update.default
_scatter = torch.ops.fastcache.residual_update_scatter_.default


def residual_update(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch.ops.fastcache.residual_update`, arguments in schema order."""
    if torch.is_inference_mode_enabled():
        return _update(*args, **kwargs)
    with _below_autograd():
        return _update(*args, **kwargs)


def residual_update_scatter_(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch.ops.fastcache.residual_update_scatter_`, arguments in schema order."""
    with _below_autograd():
        outputs = _scatter(*args, **kwargs)
    count_write(args[1])
    return outputs


def select_tokens_(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.ops.fastcache.select_tokens_`, arguments in schema order."""
    with _below_autograd():
        outputs = torch.ops.fastcache.select_tokens_.default(*args)
    count_write(args[1])
    return outputs


def row_score(*args: Any) -> torch.Tensor:
    """`torch.ops.fastcache.row_score`, arguments in schema order."""
    with _below_autograd():
        return torch.ops.fastcache.row_score.default(*args)


def value_norm(*args: Any) -> torch.Tensor:
    """`torch.ops.fastcache.value_norm`, arguments in schema order."""
    with _below_autograd():
        return torch.ops.fastcache.value_norm.default(*args)


def attention_received(*args: Any) -> torch.Tensor:
    """`torch.ops.fastcache.attention_received`, arguments in schema order."""
    with _below_autograd():
        return torch.ops.fastcache.attention_received.default(*args)


def relative_error(*args: Any) -> torch.Tensor:
    """`torch.ops.fastcache.relative_error`, arguments in schema order."""
    with _below_autograd():
        return torch.ops.fastcache.relative_error.default(*args)


def count_write(slot: torch.Tensor) -> None:
    """Raise the version counter of a tensor that a kernel has written, where PyTorch keeps one."""
    if not slot.is_inference():
        torch.autograd.graph.increment_version(slot)
