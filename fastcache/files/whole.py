"""Files that appear under their own name when complete: a run that ends at any moment leaves none cut.

Every file that FastCache writes goes through `write_whole`.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

SUFFIX = ".partial"  # after the file's own name and the number of the process that writes it


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` gets a temporary path in the same folder; what it wrote is moved to `path` when it is complete.

    Missing folders are made. A link is followed; what is no regular file, such as /dev/stdout, is written
    directly. If `write` raises, the temporary file is removed and `path` is as it was. Raises OSError naming
    the path.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file")
    if target.exists() and not target.is_file():
        write(target)
        return
    make_folder(target.parent)
    partial = target.with_name(f"{target.name}.{os.getpid()}{SUFFIX}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # its content is on the disk before its name is
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"{path}: cannot be written: {reason_of(error)}") from error
        raise


def write_text_whole(path: str | Path, text: str) -> None:
    """`text` in UTF-8 as the whole of a file."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def make_folder(folder: Path) -> None:
    """The folder and those above it. Raises OSError naming what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = next(place for place in (folder, *folder.parents) if place.exists() and not place.is_dir())
        where = "it" if place == folder else str(place)
        raise NotADirectoryError(f"{folder}: {where} is a file, expected a folder") from error
    except OSError as error:
        raise type(error)(error.errno, f"{folder}: cannot be made: {reason_of(error)}") from error


def require_writable(path: str | Path) -> None:
    """Before work whose result `path` is to hold: make its folders and find out whether it can be written.

    Raises OSError naming the path.
    """
    write_probe = Path(os.path.realpath(path))
    if write_probe.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file")
    if not write_probe.exists() or write_probe.is_file():
        require_writable_folder(write_probe.parent)


def require_writable_folder(folder: Path) -> None:
    """Make a folder and those above it, and write a file in it, which is removed again.

    Raises OSError naming the folder.
    """
    make_folder(folder)
    probe = folder / f"probe.{os.getpid()}{SUFFIX}"
    try:
        probe.write_bytes(b"probe")
    except OSError as error:
        raise type(error)(error.errno, f"{folder}: cannot be written: {reason_of(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files of processes that were killed, and return their paths."""
    left = [path for path in folder.glob(f"*{SUFFIX}") if not _is_being_written(path)]
    for path in left:
        with contextlib.suppress(OSError):
            path.unlink()
    return left


def reason_of(error: OSError) -> str:
    """What the system says, without the number and the path."""
    return error.strerror or str(error)


def _is_being_written(path: Path) -> bool:
    number = path.name.removesuffix(SUFFIX).rpartition(".")[2]
    if not number.isdecimal():
        return True  # not one of ours
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it runs, for somebody else
    return True
