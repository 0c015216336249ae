"""At the close of a session: did a GPU kernel meet an index out of range? Never asked in the loop, because
asking waits.
"""

import logging
from collections.abc import Callable

import torch
from torch import nn

from fastcache.backends.index_errors import IndexWatch, explained, named
from fastcache.errors import SessionError

logger = logging.getLogger(__name__)


def raise_index_errors(watch: IndexWatch, error: BaseException | None) -> None:
    """Read the flags of the session's devices; SessionError naming the arguments if one was set.

    error: the exception that ends the session, if any. It is the one to be seen: then a bad index,
    or a device that cannot be asked any more, is logged.
    """
    try:
        for device in watch.devices:
            found = _asked(lambda device=device: watch.take(device), error)
            if found and error is None:
                raise SessionError(explained(named(found), device))
            if found:
                logger.warning("%s", explained(named(found), device))
    finally:
        watch.close()


def _asked(ask: Callable[[], int | None], error: BaseException | None) -> int | None:
    try:
        return ask()
    except RuntimeError as failure:
        if error is None:
            raise
        logger.warning("%s", failure)
        return None


def devices_of(model: nn.Module) -> list[torch.device]:
    """Devices of the parameters, each once."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))
