"""nvcc for kernels of GPUs that are not here: what ptxas says of them, and their PTX."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

NVCC = shutil.which("nvcc") or next(
    (
        str(path)
        for path in (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc",)
        if path.exists()
    ),
    None,
)
MISSING = "nvcc is not installed: the CUDA kernels are not compiled"


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel, and its PTX."""

    registers: int
    stack: int
    spilled: int
    ptx: str

    def loads(self) -> Counter:
        """Number of global loads by width in bytes."""
        found = Counter()
        for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b", self.ptx):
            found[int(vector or 1) * int(bits) // 8] += 1
        return found


def run(command: list[object]) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def compiled(source: str, architecture: int, folder: Path) -> tuple[dict[str, Kernel], Path]:
    """Kernels of a CUDA source by mangled name, in its order, and the cubin."""
    written, ptx, cubin = folder / "kernels.cu", folder / "kernels.ptx", folder / "kernels.cubin"
    written.write_text(source)
    run(
        [
            NVCC,
            "-std=c++20",
            f"-arch=compute_{architecture}",
            f"-I{ROOT / 'csrc' / 'include'}",
            "-ptx",
            written,
            "-o",
            ptx,
        ]
    )
    told = run([NVCC, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", ptx, "-o", cubin])
    text = ptx.read_text()
    bodies = dict(zip(re.findall(r"\.entry (\w+)", text), text.split(".entry ")[1:], strict=True))
    kernels = {}
    for name, stack, stored, loaded, registers in re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes"
        r" spill loads.*?Used (\d+) registers",
        told,
        re.S,
    ):
        kernels[name] = Kernel(int(registers), int(stack), int(stored) + int(loaded), bodies[name])
    return kernels, cubin
