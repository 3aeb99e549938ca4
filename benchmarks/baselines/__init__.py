"""The ways of others, each written once: tests measure errors against them, benchmarks time them."""
