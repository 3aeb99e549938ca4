"""Benchmarks: every speed is a ratio to a named rival in the same run, and results are checked first."""
