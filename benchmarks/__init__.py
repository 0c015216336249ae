"""Benchmarks: FastCache, the host's own op sequence and torch.compile on the same inputs, in one run."""
