"""The sticky flags of bad indices that Triton kernels and device-side checks in PyTorch set."""

import torch
from torch import Tensor

FLAGS: dict[
    torch.device, Tensor
] = {}  # by device, from its first use; fastcache/backends/index_errors.py reads them


def error_flag(device: torch.device) -> Tensor:
    """[1] int32 on the device, in which bits of bad indices are set; nothing is read or written there."""
    if device not in FLAGS:
        with torch.inference_mode(False):
            FLAGS[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return FLAGS[device]
