"""The frame of a stage: its options, its deadline, and one JSON for the whole run.

The file is {"format", "dry_run", "machine", "begun", "stages": {name: {"status", "reason", ...}}}. It is
replaced as a whole after every case, so that what is there is always complete.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

FORMAT = 2
ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A stage cannot do its work; the message says why and what would help."""


class Stage:
    """A stage's part of the file. deadline: of time.monotonic(), after which no further case is begun."""

    def __init__(self, name: str, path: Path, *, dry_run: bool = False, deadline: float = 0.0) -> None:
        self.name, self.path, self.dry_run, self.deadline = name, path, dry_run, deadline
        self._content = json.loads(path.read_text())
        self.found = self._content["stages"].setdefault(name, {})

    @property
    def seconds_left(self) -> float:
        """Until the deadline; beyond any in a dry run."""
        return float("inf") if self.dry_run else self.deadline - time.monotonic()

    def put(self, **found: object) -> None:
        """Set fields."""
        self.found.update(found)
        write_json(self.path, self._content)

    def add(self, field: str, *found: object) -> None:
        """Append to a list."""
        self.put(**{field: [*self.found.get(field, []), *found]})

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"  {text}", flush=True)


def begin(path: Path, *, dry_run: bool, machine: dict) -> None:
    """Begin a run; a file of an earlier one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "dry_run": dry_run, "machine": machine, "begun": now(), "stages": {}}
    write_json(path, content)


def write_json(path: Path, content: object) -> None:
    """Replace a file as a whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def run(name: str, work: Callable[[Stage], None]) -> None:
    """The command of a stage: do the work, and record `done`, or `failed` with the reason."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gate.{name}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    stage = Stage(name, options.out, dry_run=options.dry_run, deadline=time.monotonic() + options.seconds)
    stage.put(status="running")
    try:
        work(stage)
    except Exception as error:
        if isinstance(error, Failed):
            stage.put(status="failed", reason=str(error))
        else:
            traceback.print_exc()
            stage.put(status="failed", reason=traceback.format_exception_only(error)[-1].strip())
        sys.exit(1)
    stage.put(status="done")
