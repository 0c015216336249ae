"""What compute-sanitizer watches: a few small calls that reach every kernel path. `python -m benchmarks.gate.sanitized`.

Prints the number of calls, and `ok` at the end; a wrong value is an error too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from cases import FORMS, PRECISIONS, Form  # noqa: E402
from on_device import verify  # noqa: E402

# (name of tests/cases.py, precision, tokens, channels): aligned and not, a warp or several per row, all epilogues
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


def calls() -> list[Form]:
    """The calls, small before large."""
    return [
        replace(FORMS[name].of(PRECISIONS[precision]), tokens=tokens, channels=channels)
        for name, precision, tokens, channels in CALLS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate.sanitized")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    backend = parser.parse_args().backend
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for form in calls():
        verify(form, backend, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(CALLS)} calls of {backend} on {device}: ok")


if __name__ == "__main__":
    main()
