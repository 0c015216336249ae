"""Runs the stages of the gate, each in a process of its own and within a budget of seconds.

A stage that crashes the GPU's context, or is stopped at its limit, costs the others nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gate.prerequisites import facts, missing_packages
from benchmarks.gate.results import Results, now

STAGES = {
    "build": 120,
    "tests": 100,
    "sanitizer": 55,
    "kernels": 150,
    "end_to_end": 105,
}  # seconds; 530 in all
GRACE = 8  # seconds between the end of a stage's own budget and its being stopped


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with a message that names the option, what was expected and what came."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_gate.sh", description="Build, test and measure FastCache on this machine's GPU."
    )
    parser.add_argument(
        "--only", default=",".join(STAGES), help=f"stages, comma-separated: {','.join(STAGES)}"
    )
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="STAGE=N",
        help="budget of a stage; default "
        + ", ".join(f"{name}={seconds}" for name, seconds in STAGES.items()),
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU: build for sm_90, collect the tests, and run every case at a tiny size on the CPU",
    )
    parser.add_argument("--out", type=Path, default=None, help="the JSON; default out/gpu_gate.json")
    options = parser.parse_args(arguments)
    options.stages = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown or not options.stages:
        parser.error(f"--only: expected some of {', '.join(STAGES)}, got {options.only!r}")
    options.budgets = dict(STAGES)
    for text in options.seconds:
        name, _, seconds = text.partition("=")
        if name not in STAGES or not seconds.isdigit():
            parser.error(f"--seconds: expected STAGE=N with a stage of {', '.join(STAGES)}, got {text!r}")
        options.budgets[name] = int(seconds)
    options.out = (options.out or Path("out/gpu_gate.json")).resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every stage that was asked for is done, 1 otherwise."""
    options = parsed(arguments)
    missing = missing_packages()
    if missing:
        sys.exit(
            "gpu_gate: missing packages: "
            + "; ".join(f"{name} ({why})" for name, why in missing.items())
            + f". Fix: pip install {' '.join(missing)}, or name another interpreter with PYTHON="
        )
    found = facts()
    if not options.dry_run and not found["gpus"]:
        sys.exit("gpu_gate: nvidia-smi finds no GPU here. Use --dry-run to check everything but the GPU")
    results = Results.new(options.out, dry_run=options.dry_run, machine=found)
    say(
        f"gpu_gate{' (dry run)' if options.dry_run else ''}: {', '.join(options.stages)} -> {options.out.name}"
    )
    for name, why in found["absent"].items():
        say(f"  absent: {name} ({why})")
    for name in options.stages:
        run_stage(name, options.budgets[name], options.dry_run, options.out)
    content = Results(options.out).content["stages"]
    failed = [name for name in options.stages if content[name]["status"] != "done"]
    say("gpu_gate: " + ", ".join(f"{name} {content[name]['status']}" for name in options.stages))
    return 1 if failed else 0


def run_stage(name: str, seconds: int, dry_run: bool, out: Path) -> None:
    """One stage in a process of its own; whatever becomes of it is in the file."""
    say(f"== {name} ({seconds} s at most)")
    Results(out).put(name, status="running", begun=now(), budget_s=seconds)
    begun = time.monotonic()
    command = [
        sys.executable,
        "-m",
        f"benchmarks.gate.{name}",
        "--out",
        str(out),
        "--seconds",
        str(seconds),
        *(["--dry-run"] if dry_run else []),
    ]
    code = stopped_after(command, None if dry_run else seconds + GRACE)
    results = Results(out)
    stage = results.stage(name)
    wall = round(time.monotonic() - begun, 1)
    if code is None:
        results.put(
            name,
            status="stopped",
            reason=f"stopped after {seconds + GRACE} s; what it had found is here",
            wall_s=wall,
        )
    elif stage["status"] == "running":
        results.put(
            name,
            status="failed",
            reason=f"its process ended with status {code} (negative: a signal); what it had found is here",
            wall_s=wall,
        )
    else:
        results.put(name, wall_s=wall)
    say(f"== {name}: {results.stage(name)['status']} after {wall} s. {results.stage(name).get('reason', '')}")


def stopped_after(command: list[str], seconds: int | None) -> int | None:
    """Exit status of a command; None if it was stopped, with everything that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
