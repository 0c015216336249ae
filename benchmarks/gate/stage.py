"""The frame of a stage: its options, its deadline, and one JSON for the whole run.

The file is replaced as a whole after every case, so that what is there is always complete.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A stage cannot do its work; the message says why and what would help."""


class Results:
    """The file of a run: {"format", "dry_run", "machine", "stages": {name: {"status", "reason", ...}}}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty = {"format": FORMAT, "dry_run": False, "machine": {}, "stages": {}}
        self.content = json.loads(path.read_text()) if path.exists() else empty

    @classmethod
    def new(cls, path: Path, *, dry_run: bool, machine: Mapping[str, object]) -> "Results":
        """Begin a run; a file of an earlier one is replaced."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        results = cls(path)
        results.content |= {"dry_run": dry_run, "machine": dict(machine), "begun": now()}
        write_json(path, results.content)
        return results

    def stage(self, name: str) -> dict:
        """What a stage has found so far."""
        return self.content["stages"].setdefault(name, {})

    def put(self, name: str, **found: object) -> None:
        """Set fields of a stage."""
        self.stage(name).update(found)
        write_json(self.path, self.content)

    def add(self, name: str, field: str, *found: object) -> None:
        """Append to a list of a stage."""
        self.stage(name).setdefault(field, []).extend(found)
        write_json(self.path, self.content)


def write_json(path: Path, content: object) -> None:
    """Replace a file as a whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Stage:
    """A running stage. deadline: reading of time.monotonic() after which no further case is begun."""

    name: str
    results: Results
    dry_run: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        """Until the deadline; beyond any in a dry run."""
        return float("inf") if self.dry_run else self.deadline - time.monotonic()

    @property
    def found(self) -> dict:
        """This stage's part of the results."""
        return self.results.stage(self.name)

    def put(self, **found: object) -> None:
        """Set fields of this stage's part."""
        self.results.put(self.name, **found)

    def add(self, field: str, *found: object) -> None:
        """Append to a list of this stage's part."""
        self.results.add(self.name, field, *found)

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"  {text}", flush=True)


def run(name: str, work: Callable[[Stage], None]) -> None:
    """The command of a stage: do the work, and record `done`, or `failed` with the reason."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gate.{name}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    stage = Stage(name, Results(options.out), options.dry_run, time.monotonic() + options.seconds)
    stage.put(status="running")
    try:
        work(stage)
    except Failed as reason:
        stage.put(status="failed", reason=str(reason))
        stage.say(str(reason))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        stage.put(status="failed", reason=f"{type(error).__name__}: {lines[0]}")
        sys.exit(1)
    stage.put(status="done")
