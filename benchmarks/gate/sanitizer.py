"""Stage `sanitizer`: compute-sanitizer's memcheck and racecheck over a few calls of every kernel path."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace

from benchmarks.gate.prerequisites import tool
from benchmarks.gate.stage import ROOT, Failed, Stage, run

TOOLS, BACKENDS = ("memcheck", "racecheck"), ("cuda", "triton")
FOUND = 86  # exit status when a tool found something
LAST_LINES = 20
NOT_FINISHED = "not finished in time"
# (name of tests/cases.py, precision, tokens, channels): aligned and not, a warp or several per row, all
# epilogues
CALLS = (
    ("packed-gates", "bf16", 33, 1152),
    ("gated-per-token", "bf16", 5, 72),
    ("float8", "bf16", 9, 136),
    ("sum", "fp32", 5, 7),
    ("all", "bf16", 19, 1152),
    ("all", "fp32", 9, 3072),
    ("all", "bf16", 5, 1155),
    ("refresh-between", "bf16", 33, 1152),
    ("refresh-all", "bf16", 19, 3072),
    ("float8-refresh", "bf16", 9, 1152),
    ("errors-only", "bf16", 300, 136),
    ("packed-rows-only", "fp16", 17, 1536),
)


def calls() -> list:
    """What is watched, small before large."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    from cases import FORMS, PRECISIONS

    forms = [(FORMS[name].of(PRECISIONS[precision]), *size) for name, precision, *size in CALLS]
    return [replace(form, tokens=tokens, channels=channels) for form, tokens, channels in forms]


def watched(backend: str) -> None:
    """Make the calls and compare the values, then print `ok`."""
    import torch

    forms = calls()
    from on_device import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for form in forms:
        verify(form, backend, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(CALLS)} calls of {backend} on {device}: ok")


def command(backend: str) -> list[str]:
    """A process that makes the calls."""
    return [sys.executable, "-c", f"from benchmarks.gate.sanitizer import watched; watched({backend!r})"]


def sanitizer(stage: Stage) -> None:
    """All tools and backends at once: most of their time is one thread of the CPU each."""
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if stage.dry_run:
        for backend in BACKENDS:
            done = subprocess.run(command(backend), **pipes)
            last = done.stdout.strip().splitlines()[-1]
            stage.put(**{f"rehearsal_{backend}": last})
            if done.returncode != 0:
                raise Failed(f"the calls that the sanitizer would watch fail on a CPU: {last}")
        stage.say(f"{len(BACKENDS)} sets of calls rehearsed on a CPU")
        return
    found = tool("compute-sanitizer")
    if not found.path:
        stage.put(skipped=f"compute-sanitizer was not found; {found.fix}")
        stage.say("skipped: compute-sanitizer was not found")
        return
    # without the caching allocator every tensor is an allocation of its own, so that a read beyond it is seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started, verdicts = {}, {}
    for backend in runnable(stage):
        for name in TOOLS:
            watching = [found.path, "--tool", name, "--error-exitcode", str(FOUND), *command(backend)]
            started[f"{name} {backend}"] = subprocess.Popen(watching, env=environment, **pipes)
    for name, process in started.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, stage.deadline - time.monotonic()))
            verdicts[name] = verdict(process.returncode, output)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            verdicts[name] = NOT_FINISHED
        stage.put(verdicts=verdicts)
        if verdicts[name] != "clean":
            stage.add("output", {"run": name, "lines": output.splitlines()[-LAST_LINES:]})
        stage.say(f"{name}: {verdicts[name]}")
    bad = [name for name, text in verdicts.items() if text.startswith("status")]
    if bad:
        raise Failed(f"found something: {', '.join(bad)}; see `output`")


def runnable(stage: Stage) -> list[str]:
    """Backends to watch; which are left out, and why, goes into the results."""
    import fastcache

    status = fastcache.backends_status()
    absent = {name: status[name].reason for name in BACKENDS if not status[name].available}
    stage.put(absent=absent)
    return [name for name in BACKENDS if name not in absent]


def verdict(code: int, output: str) -> str:
    """What a run of a tool says."""
    if code == 0 and "ok" in output:
        return "clean"
    refused = [line for line in output.splitlines() if "Device not supported" in line or "Unable to" in line]
    if refused:
        return f"cannot run on this machine: {refused[0].strip('= ').strip()}"
    summary = re.findall(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)", output)
    return f"status {code}: {summary[-1][1] if summary else 'no summary'}"


if __name__ == "__main__":
    run("sanitizer", sanitizer)
