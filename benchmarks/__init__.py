"""Benchmarks: every speed is a ratio against a named rival in the same run, after its numerics were checked."""
