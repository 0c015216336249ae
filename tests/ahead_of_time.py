"""Compile Triton kernels for GPUs that are not here, and read what came out."""

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "table": "*i64",
    "gate_index": "*i32",
    "weights": "*fp32",
    "scales": "*fp32",
    "fresh_slots": "*i32",
    "row_slots": "*i32",
    "flag": "*i32",
    "errors": "*fp32",
    "slot_scale": "*fp32",
    "lse": "*fp32",
    "partial": "*fp32",
}
TENSORS = (
    "x",
    "out",
    "h",
    "gates",
    "slot",
    "fresh",
    "shift",
    "scale",
    "norm_weight",
    "norm_bias",
    "reference",
    "q",
    "k",
)
STRIDES = ("_batch", "_token", "_row", "_frame", "_head")
FLOATS = ("eps", "factor")


@dataclass(frozen=True)
class Build:
    """One compiled kernel: PTX text and what ptxas says of its resources."""

    ptx: str
    registers: int
    stack: int
    local: int
    shared: int

    def loads(self) -> Counter:
        """Number of global loads by width in bytes, asynchronous copies of feature tiles included."""
        found = Counter()
        for vector, bits in re.findall(r"ld\.global(?:\.L\S*?)?(?:\.v(\d))?\.b(\d+)", self.ptx):
            found[int(vector or 1) * int(bits) // 8] += 1
        return found

    def async_copies(self) -> Counter:
        """Number of cp.async instructions by width in bytes."""
        return Counter(
            int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\S* .*?, (0x\w+)[,;]", self.ptx)
        )


def compiled(
    kernel, constants: dict, capability: int, warps: int, tensor: str = "bf16", aligned: bool = True
) -> Build:
    """Compile one specialisation; tensors of dtype `tensor`, 16-byte aligned if `aligned`."""
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
            continue
        signature[name] = POINTERS.get(name) or (
            f"*{tensor}"
            if name in TENSORS
            else "i64"
            if name.endswith(STRIDES)
            else "fp32"
            if name in FLOATS
            else "i32"
        )
        if signature[name].startswith("*") and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
    return Build(built.asm["ptx"], *_resources(built.asm["cubin"]), built.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL"))
