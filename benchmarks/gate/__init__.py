"""The GPU gate: builds, tests and measures on a machine with a GPU, in one call. Started by
benchmarks/gpu_gate.sh."""
