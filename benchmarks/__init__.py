"""Benchmarks: every speed is a ratio against a named rival of the same run, its numerics checked first."""
