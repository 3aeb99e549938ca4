"""Implementations of others, each written once: tests compare errors with them, benchmarks time them."""
