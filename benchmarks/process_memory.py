"""Memory of a process, as Linux counts it, and calls in a fresh process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bloomft.process import release_freed_memory


def resident() -> int:
    """Bytes in memory now."""
    return _read("VmRSS")


def peak() -> int:
    """Bytes at the highest since `reset_peak`."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Start a new peak at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_over(step: Callable[[], object]) -> int:
    """Bytes that step takes at its peak beyond what this process has in use before it."""
    # a step that fits into blocks that glibc keeps would seem to need no memory
    release_freed_memory()
    reset_peak()
    before = resident()
    step()
    return peak() - before


def in_fresh_process(function: Callable, *arguments: object):
    """The result of an importable function in a new process; BrokenProcessPool if that was killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def _read(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
