"""Optional dependencies: FastCache itself needs torch and numpy, everything else is an extra."""

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTIONS = {"PIL": "pillow"}  # where another name is installed than is imported


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports inside this block belong to `extra`; a missing one says how to install it.

    Raises ModuleNotFoundError that names the missing module and the commands that bring it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastcache"):
            raise
        package = error.name.partition(".")[0]
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install {DISTRIBUTIONS.get(package, package)}; or all of the"
            f" extra, in a checkout of FastCache: pip install --no-build-isolation '.[{extra}]'",
            name=error.name,
        ) from error
