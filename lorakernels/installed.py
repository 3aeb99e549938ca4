"""Which optional packages are installed."""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; without it every operator runs in ATen operations."""
    return importlib.util.find_spec("triton") is not None
