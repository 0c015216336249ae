"""The GPU gate, started by benchmarks/gpu_gate.sh: builds, tests and measures on a machine with a GPU."""
