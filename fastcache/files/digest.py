"""Digests that recognise a file's content."""

import hashlib
from pathlib import Path


def digest_of_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; read in pieces."""
    found = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()
