"""At the close of a session: did a GPU kernel meet an index out of range? Never asked in the loop, because
asking waits.
"""

import logging

import torch
from torch import nn

from fastcache.backends.index_errors import explained, take_index_errors
from fastcache.errors import SessionError

logger = logging.getLogger(__name__)


def raise_index_errors(model: nn.Module, error: BaseException | None) -> None:
    """Read and clear the flags of the model's devices; SessionError naming the arguments if one was set.

    error: the exception that ends the session, if any. It is the one to be seen: then a bad index,
    or a device that cannot be asked any more, is logged.
    """
    for device in devices_of(model):
        try:
            names = take_index_errors(device)
        except RuntimeError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)
            continue
        if names and error is None:
            raise SessionError(explained(names, device))
        if names:
            logger.warning("%s", explained(names, device))


def devices_of(model: nn.Module) -> list[torch.device]:
    """Devices of the parameters, each once."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))
