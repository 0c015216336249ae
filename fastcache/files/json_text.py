"""JSON that may be damaged: whatever is wrong with it is one ValueError that names the place and the fix."""

import json
from pathlib import Path

MOST_BYTES = 256 * 2**20  # a schedule of DiT-XL/2 over 1000 steps has half a million


def read_json(path: str | Path, name: str = "path") -> object:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises FileNotFoundError and OSError, and ValueError for what is no JSON; all name `name` and the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{name}: {path} is a folder, expected a JSON file")
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{name}: {path}: expected JSON of at most {MOST_BYTES // 2**20} MiB")
    return parse_json(path.read_bytes(), f"{name}: {path}")


def parse_json(text: str | bytes, where: str) -> object:
    """JSON text, or UTF-8 with or without a byte order mark. Raises ValueError that begins with `where`."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not JSON: expected text in UTF-8, found other bytes") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON of ours: too many brackets within brackets") from None
    except ValueError as error:  # JSONDecodeError is one; numbers of thousands of digits are another
        raise ValueError(f"{where}: not JSON: {error}") from None
