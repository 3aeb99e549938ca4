"""Memory of this process, as Linux counts it."""

from pathlib import Path


def resident() -> int:
    """Bytes in memory now."""
    return _read("VmRSS")


def peak() -> int:
    """Bytes at the highest since `reset_peak`."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Start a new peak at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _read(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
