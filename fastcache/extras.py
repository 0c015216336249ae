"""Optional dependencies: FastCache itself needs torch and numpy, everything else is an extra."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports inside this block belong to `extra`; a missing one says how to install it.

    Raises ModuleNotFoundError that names the missing module and the command that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastcache"):
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed; it comes with: pip install 'fastcache-dit[{extra}]'",
            name=error.name,
        ) from error
