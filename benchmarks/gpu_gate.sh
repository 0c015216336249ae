#!/usr/bin/env bash
# Builds, tests and measures FastCache on the GPU of this machine in one call of under nine minutes.
#
#   benchmarks/gpu_gate.sh [--only build,tests,sanitizer,kernels,end_to_end] [--seconds kernels=300] [--dry-run] [--out PATH]
#
# One JSON is written, case by case, so that a time limit loses only what it cut off. It needs torch, triton,
# numpy, pytest and, to build, nvcc, cmake and pybind11; it says what is missing. No network.
# PYTHON names the interpreter (default: python3). benchmarks/README.md has the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gate "$@"
