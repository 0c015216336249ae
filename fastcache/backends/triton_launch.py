"""What every launch of a Triton kernel asks of its tensors and their device."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def aligned(tensor: Tensor) -> bool:
    """True if every row starts at 16 bytes and strides keep it so."""
    return tensor.data_ptr() % 16 == 0 and all(
        stride % 8 == 0
        for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        if size > 1
    )


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU current; a CPU, in the interpreter, needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.device(device)
