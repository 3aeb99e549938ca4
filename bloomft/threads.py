"""CPU threads on a machine that others use too. Nothing here imports torch, which reads these settings."""

import math
import os
from pathlib import Path

_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# of libgomp's own unit; on a quiet machine a step takes 0.8% longer than by default, with 1,000 9%
SPIN_COUNT = 20_000


def share_cores() -> None:
    """Let OpenMP's threads sleep soon while they wait for each other; to be called before torch is imported.

    libgomp's spin for milliseconds by default. Where more threads are runnable than there are cores, one
    that spins takes the time from the one that it waits for: beside one busy process a step takes many times
    as long. `benchmarks/busy_machine.py` measures both. What the user has set in the environment stays.
    """
    if not any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def usable_cores() -> int:
    """How many cores this process may use: by its affinity (taskset) and its cgroup's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(Path("/sys/fs/cgroup")))))


def _quota(cgroup: Path) -> float:
    """Cores that the cgroup mounted at this folder may keep busy; inf without a limit."""
    try:  # version 2
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return math.inf
    try:
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (ValueError, ZeroDivisionError):
        return math.inf  # "max"
