"""Stage `sanitizer`: compute-sanitizer's memcheck and racecheck over a few calls of every kernel path."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gate.prerequisites import tool
from benchmarks.gate.stage import Failed, Stage, run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status when a tool found something
LAST_LINES = 20


def sanitizer(stage: Stage) -> None:
    """All tools and backends at once: most of their time is one thread of the CPU each."""
    plain = [sys.executable, "-m", "benchmarks.gate.sanitized", "--backend"]
    backends = runnable(stage)
    if stage.dry_run:
        for backend in backends:
            done = subprocess.run([*plain, backend], cwd=ROOT, text=True, capture_output=True)
            stage.put(**{f"rehearsal_{backend}": (done.stdout + done.stderr).strip().splitlines()[-1]})
            if done.returncode != 0:
                raise Failed(
                    f"the calls that the sanitizer would watch fail on a CPU: {done.stderr.strip().splitlines()[-1]}"
                )
        stage.say(f"{len(backends)} sets of calls rehearsed on a CPU")
        return
    found = tool("compute-sanitizer")
    if not found.path:
        stage.put(skipped=f"compute-sanitizer was not found; {found.fix}")
        stage.say("skipped: compute-sanitizer was not found")
        return
    # without the caching allocator every tensor is an allocation of its own, so that a read beyond it is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = {}
    for backend in backends:
        for name in TOOLS:
            command = [found.path, "--tool", name, "--error-exitcode", str(FOUND), *plain, backend]
            started[backend, name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
    verdicts = {}
    for (backend, name), process in started.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, stage.deadline - time.monotonic()))
            verdicts[f"{name} {backend}"] = verdict(process.returncode, output)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            verdicts[f"{name} {backend}"] = "not finished in time"
        stage.put(verdicts=verdicts)
        if verdicts[f"{name} {backend}"] != "clean":
            stage.add("output", {"run": f"{name} {backend}", "lines": output.splitlines()[-LAST_LINES:]})
        stage.say(f"{name} {backend}: {verdicts[f'{name} {backend}']}")
    bad = [
        name
        for name, text in verdicts.items()
        if text not in ("clean", "not finished in time") and not text.startswith("cannot")
    ]
    if bad:
        raise Failed(f"found something: {', '.join(bad)}; see `output`")


def runnable(stage: Stage) -> list[str]:
    """Backends to watch; which are left out, and why, goes into the results."""
    if stage.dry_run:
        return ["cuda", "triton"]
    import fastcache

    status = fastcache.backends_status()
    absent = {name: status[name].reason for name in ("cuda", "triton") if not status[name].available}
    stage.put(absent=absent)
    return [name for name in ("cuda", "triton") if name not in absent]


def verdict(code: int, output: str) -> str:
    """What a run of a tool says."""
    if code == 0 and "ok" in output:
        return "clean"
    if "Device not supported" in output or "Unable to" in output:
        return "cannot run on this machine: " + next(
            line.strip("= ").strip()
            for line in output.splitlines()
            if "not supported" in line or "Unable to" in line
        )
    summary = re.findall(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", output)
    return f"status {code}: {summary[-1][1] if summary else 'no summary'}"


if __name__ == "__main__":
    run("sanitizer", sanitizer)
