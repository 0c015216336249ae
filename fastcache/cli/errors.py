"""What a command says when something is wrong: the argument, its value and the fix, in one line."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from typer import BadParameter

from fastcache.errors import FastCacheError
from fastcache.files.whole import reason_of

WRONG_INPUT, INTERNAL, INTERRUPTED = 2, 1, 130
FIXES = {
    errno.ENOSPC: "; free some space and run the same command again",
    errno.EDQUOT: "; free some space and run the same command again",
    errno.EACCES: "; choose another place or change its permissions",
    errno.EPERM: "; choose another place or change its permissions",
    errno.EROFS: "; choose another place",
}
MEMORY = "out of memory"


def line_of(error: BaseException, options: Iterable[str] = ()) -> tuple[str, int]:
    """The text of an error on one line, and the exit status: 2 for what the user can mend, 1 for the rest.

    options: names of the command's options, such as batch_size; an error that begins with one of them and a
    colon names it as it is typed.
    """
    text = _option_named(_one_line(error), options)
    if is_out_of_memory(error):
        return f"{MEMORY}: use a smaller --batch-size, model or --dtype ({text[:120]})", WRONG_INPUT
    if isinstance(error, OSError):
        return _of_system(error), WRONG_INPUT
    if isinstance(error, (BadParameter, FastCacheError, ValueError, ImportError, NotImplementedError)):
        return text, WRONG_INPUT
    return f"internal error: {type(error).__name__}: {text}", INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, a GPU's, and that of PyTorch's allocator on the CPU."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said))
    )


def refusal(option: str, error: BaseException, place: str = "path") -> BadParameter:
    """An error about what `option` names; `place` is what the library calls it."""
    return BadParameter(f"{option}: {_said(error).removeprefix(f'{place}: ')}")


@contextmanager
def naming(option: str) -> Iterator[None]:
    """What the system refuses in this block, such as a folder that cannot be written, is about `option`."""
    try:
        yield
    except OSError as error:
        raise BadParameter(f"{option}: {_of_system(error)}") from error


def _of_system(error: OSError) -> str:
    said = reason_of(error)
    if error.filename is not None:
        said = f"{error.filename}: {said}"
    return " ".join(said.split()) + FIXES.get(error.errno or 0, "")


def _said(error: BaseException) -> str:
    return reason_of(error) if isinstance(error, OSError) and error.filename is None else str(error)


def _one_line(error: BaseException) -> str:
    """All lines of a short text, the first one of a long one."""
    said = getattr(error, "message", None) or _said(error)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    whole = " ".join(lines)
    return (whole if len(whole) <= 600 else lines[0][:600]) if lines else type(error).__name__


def _option_named(text: str, options: Iterable[str]) -> str:
    found = re.match(r"([a-z_]+): ", text)
    if found is None or found[1] not in options:
        return text
    return f"--{found[1].replace('_', '-')}: {text[found.end() :]}"
