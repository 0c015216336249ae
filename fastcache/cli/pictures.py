"""The folder of `sample`: whose pictures it holds, and which of them can be opened."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typer import BadParameter

from fastcache.cli.errors import naming
from fastcache.extras import needs_extra
from fastcache.files.digest import digest_of_file
from fastcache.files.json_text import read_json
from fastcache.files.whole import (
    remove_leftovers,
    require_writable_folder,
    write_text_whole,
    write_whole,
)

PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class PictureFolder:
    """Pictures of one set of settings; the file settings.json in the folder says which."""

    folder: Path
    names: Sequence[str]  # of the pictures that belong here, in order
    settings: Mapping[str, object]  # everything that changes a picture

    @property
    def record(self) -> Path:
        """The file with the settings."""
        return self.folder / "settings.json"

    def check(self) -> None:
        """Before any work: the folder can be written, and holds nothing of other settings.

        Raises BadParameter naming what to delete. Temporary files of killed runs are removed.
        """
        with naming("--out"):
            require_writable_folder(self.folder)
        remove_leftovers(self.folder)
        if not self.record.exists():
            if any((self.folder / name).exists() for name in self.names):
                raise BadParameter(
                    f"--out: {self.folder} holds pictures, but no {self.record.name} that says of which"
                    " settings; delete them or choose another folder"
                )
            return
        try:
            found = read_json(self.record, "--out")
        except (ValueError, OSError) as error:
            raise BadParameter(f"{error}; delete {self.folder} or choose another folder") from error
        wanted = json.loads(json.dumps(self.settings))
        if not isinstance(found, dict):
            raise BadParameter(f"--out: {self.record} is not ours; delete it or choose another folder")
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        if differing or set(found) - set(wanted):
            shown = ", ".join(_difference(name, found, wanted) for name in differing[:3]) or "others"
            raise BadParameter(
                f"--out: {self.folder} holds pictures of other settings ({shown}; see {self.record.name});"
                " delete it or choose another folder"
            )

    def missing(self, size: tuple[int, int] | None) -> tuple[list[int], list[str]]:
        """Indices of the pictures that are to be made, and the names of those of them that are damaged.

        size: of the pictures, if that is known.
        """
        missing, damaged = [], []
        for index, name in enumerate(self.names):
            path = self.folder / name
            if path.exists():
                if _opens(path, size):
                    continue
                damaged.append(name)
            missing.append(index)
        return missing, damaged

    def write(self, index: int, pixels: np.ndarray) -> None:
        """One picture [S, S, 1 or 3] uint8. The first one claims the folder: a run that failed does not."""
        with needs_extra("demo"):
            from PIL import Image
        if not self.record.exists():
            write_text_whole(self.record, json.dumps(self.settings, indent=2) + "\n")
        picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        write_whole(self.folder / self.names[index], lambda partial: picture.save(partial, format="PNG"))


def digest_of_weights(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    if path.is_file():
        return digest_of_file(path)
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        found.update(f"{file.relative_to(path)} {digest_of_file(file)}\n".encode())
    return found.hexdigest()


def _opens(path: Path, size: tuple[int, int] | None) -> bool:
    """True if it is a picture to its last line, and of this size."""
    from PIL import Image

    try:
        if not path.read_bytes().endswith(PNG_END):  # which Pillow does not ask for
            return False
        with Image.open(path, formats=("PNG",)) as picture:
            picture.load()
            return size is None or picture.size == size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _difference(name: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    there, here = (str(values.get(name, "nothing")) for values in (found, wanted))
    if max(len(there), len(here)) > 40:
        return f"another {name}"
    return f"{name} {there}, now {here}"
