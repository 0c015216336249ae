"""One JSON for a run of the gate, replaced as a whole after every case, so that what is there is always complete."""

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

FORMAT = 1


class Results:
    """The file of a run: {"format", "dry_run", "machine", "stages": {name: {"status", "reason", ...}}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = (
            json.loads(path.read_text())
            if path.exists()
            else {"format": FORMAT, "dry_run": False, "machine": {}, "stages": {}}
        )

    @classmethod
    def new(cls, path: Path, *, dry_run: bool, machine: Mapping[str, object]) -> "Results":
        """Begin a run; a file of an earlier one is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        results = cls(path)
        results._content |= {"dry_run": dry_run, "machine": dict(machine), "begun": now()}
        results._write()
        return results

    @property
    def content(self) -> dict:
        """Everything, as it is in the file."""
        return self._content

    def stage(self, name: str) -> dict:
        """What a stage has found so far."""
        return self._content["stages"].setdefault(name, {})

    def put(self, name: str, **found: object) -> None:
        """Set fields of a stage."""
        self.stage(name).update(found)
        self._write()

    def add(self, name: str, field: str, *found: object) -> None:
        """Append to a list of a stage."""
        self.stage(name).setdefault(field, []).extend(found)
        self._write()

    def _write(self) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self._content, indent=1) + "\n")
        beside.replace(self.path)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
