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
from functools import partial
from pathlib import Path

from benchmarks.gate.prerequisites import REQUIRED, facts, missing
from benchmarks.gate.stage import Stage, begin, now

# seconds; 530 in all
STAGES = {"build": 120, "tests": 100, "sanitizer": 55, "kernels": 150, "end_to_end": 105}  # fmt: skip
GRACE = 8  # seconds between the end of a stage's own budget and its being stopped
say = partial(print, flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Exits with a message that names the option, what was expected and what came."""
    text = "Build, test and measure FastCache on this machine's GPU."
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_gate.sh", description=text)
    names, budgets = ",".join(STAGES), ", ".join(f"{name}={seconds}" for name, seconds in STAGES.items())
    parser.add_argument("--only", default=names, help=f"stages, comma-separated: {names}")
    budget = f"budget of a stage; default {budgets}"
    parser.add_argument("--seconds", action="append", default=[], metavar="STAGE=N", help=budget)
    dry = "without a GPU: build for sm_90, collect the tests, and run every case at a tiny size on the CPU"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_gate.json"), help="the JSON")
    options = parser.parse_args(arguments)
    options.stages = [name for name in options.only.split(",") if name]
    if not options.stages or any(name not in STAGES for name in options.stages):
        parser.error(f"--only: expected some of {', '.join(STAGES)}, got {options.only!r}")
    options.budgets = dict(STAGES)
    for text in options.seconds:
        name, _, seconds = text.partition("=")
        if name not in STAGES or not seconds.isdigit():
            parser.error(f"--seconds: expected STAGE=N with a stage of {', '.join(STAGES)}, got {text!r}")
        options.budgets[name] = int(seconds)
    options.out = options.out.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every stage that was asked for is done, 1 otherwise."""
    options = parsed(arguments)
    if lacking := missing(REQUIRED):
        wanted = "; ".join(f"{name} (needed by {why})" for name, why in lacking.items())
        fix = f"Fix: pip install {' '.join(lacking)}, or name another interpreter with PYTHON="
        sys.exit(f"gpu_gate: missing packages: {wanted}. {fix}")
    found = facts()
    if not options.dry_run and not found["gpus"]:
        sys.exit("gpu_gate: nvidia-smi finds no GPU here. Use --dry-run to check everything but the GPU")
    begin(options.out, dry_run=options.dry_run, machine=found)
    dry = " (dry run)" if options.dry_run else ""
    say(f"gpu_gate{dry}: {', '.join(options.stages)} -> {options.out.name}")
    for name, why in found["absent"].items():
        say(f"  absent: {name} ({why})")
    statuses = {name: run_stage(name, options.budgets[name], options) for name in options.stages}
    say("gpu_gate: " + ", ".join(f"{name} {status}" for name, status in statuses.items()))
    return int(set(statuses.values()) != {"done"})


def run_stage(name: str, seconds: int, options: argparse.Namespace) -> str:
    """One stage in a process of its own; whatever becomes of it is in the file. Gives its status."""
    out, dry_run = options.out, options.dry_run
    say(f"== {name} ({seconds} s at most)")
    Stage(name, out).put(status="running", begun=now(), budget_s=seconds)
    begun = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.gate.{name}", "--out", str(out), "--seconds", str(seconds)]
    command += ["--dry-run"] if dry_run else []
    code = stopped_after(command, None if dry_run else seconds + GRACE)
    stage = Stage(name, out)
    stage.put(wall_s=round(time.monotonic() - begun, 1))
    kept = "what it had found is here"
    if code is None:
        stage.put(status="stopped", reason=f"stopped after {seconds + GRACE} s; {kept}")
    elif stage.found["status"] == "running":
        reason = f"its process ended with status {code} (negative: a signal); {kept}"
        stage.put(status="failed", reason=reason)
    found = stage.found
    say(f"== {name}: {found['status']} after {found['wall_s']} s. {found.get('reason', '')}")
    return found["status"]


def stopped_after(command: list[str], seconds: int | None) -> int | None:
    """Exit status of a command; None if it was stopped, with everything that it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        return None


if __name__ == "__main__":
    sys.exit(main())
