"""The frame of a stage: its options, its deadline, and its status in the results."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gate.results import Results


class Failed(Exception):
    """A stage cannot do its work; the message says why and what would help."""


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

    def put(self, **found: object) -> None:
        """Set fields of this stage's part of the results."""
        self.results.put(self.name, **found)

    def add(self, field: str, *found: object) -> None:
        """Append to a list of this stage's part of the results."""
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
        stage.put(
            status="failed",
            reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
        )
        sys.exit(1)
    stage.put(status="done")
