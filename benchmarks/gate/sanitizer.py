"""Stage `sanitizer`: compute-sanitizer's memcheck and racecheck over a few calls of every kernel path."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import torch

import fastcache
from benchmarks.gate.prerequisites import tool
from benchmarks.gate.stage import ROOT, Failed, Stage, run

TOOLS, BACKENDS = ("memcheck", "racecheck"), ("cuda", "triton")
# (name of tests/cases.py, precision, tokens, channels): aligned and not, one warp a row and several
CALLS = (
    ("packed-gates", "bf16", 33, 1152), ("gated-per-token", "bf16", 5, 72), ("float8", "bf16", 9, 136),
    ("sum", "fp32", 5, 7), ("all", "bf16", 19, 1152), ("all", "fp32", 9, 3072), ("all", "bf16", 5, 1155),
    ("refresh-between", "bf16", 33, 1152), ("refresh-all", "bf16", 19, 3072),
    ("float8-refresh", "bf16", 9, 1152), ("errors-only", "bf16", 300, 136),
    ("packed-rows-only", "fp16", 17, 1536),
)  # fmt: skip


def watched(backend: str) -> None:
    """Make the calls, small before large, and compare the values, then print `ok`."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
    from cases import FORMS, PRECISIONS
    from on_device import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, precision, tokens, channels in CALLS:
        form = replace(FORMS[name].of(PRECISIONS[precision]), tokens=tokens, channels=channels)
        verify(form, backend, device)
    print("ok")  # every value was read, so that the GPU is idle


def sanitizer(stage: Stage) -> None:
    """All tools and backends at once: most of their time is one thread of the CPU each."""
    found = tool("compute-sanitizer")
    if not stage.dry_run and not found.path:
        stage.put(reason=f"skipped: compute-sanitizer was not found; {found.fix}")
        return
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # without the caching allocator every tensor is an allocation of its own: reads beyond it are seen
    pipes["env"] = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started, verdicts = {}, {}
    status = fastcache.backends_status()
    for backend in (name for name in BACKENDS if stage.dry_run or status[name].available):
        call = f"from benchmarks.gate.sanitizer import watched; watched({backend!r})"
        for name in ("rehearsal",) if stage.dry_run else TOOLS:
            watching = [] if stage.dry_run else [found.path, "--tool", name, "--error-exitcode", "86"]
            command = [*watching, sys.executable, "-c", call]
            started[f"{name} {backend}"] = subprocess.Popen(command, **pipes)
    for name, process in started.items():
        try:
            output, _ = process.communicate(timeout=None if stage.dry_run else max(1.0, stage.seconds_left))
            verdicts[name] = verdict(process.returncode, output)
        except subprocess.TimeoutExpired:
            process.kill()
            output, verdicts[name] = process.communicate()[0], "not finished in time"
        stage.put(verdicts=verdicts)
        stage.add("output", {"run": name, "lines": output.splitlines()[-20:]})
        stage.say(f"{name}: {verdicts[name]}")
    if bad := [name for name, text in verdicts.items() if text.startswith("status")]:
        raise Failed(f"found something: {', '.join(bad)}; see `output`")


def verdict(code: int, output: str) -> str:
    """What a run of a tool says."""
    refused = re.search(r"Error: Device not supported.*", output)
    if refused:
        return f"cannot run on this machine: {refused[0]}"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output) or ["no summary"]
    return "clean" if code == 0 and "ok" in output else f"status {code}: {summary[-1]}"


if __name__ == "__main__":
    run("sanitizer", sanitizer)
