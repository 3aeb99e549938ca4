"""Settings of the whole process: threads, memory, device.

torch is imported inside the functions, since `share_cores` sets what torch reads when it is imported.
"""

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bloomft.errors import UserError

if TYPE_CHECKING:
    import torch

_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# in libgomp's unit; on an idle machine a step takes 0.8% longer than with the default, with 1,000 9%
SPIN_COUNT = 20_000

# the values of train.precision and torch's names for them
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_MADV_DONTNEED = 4


def share_cores() -> None:
    """Make waiting OpenMP threads stop spinning early; to be called before torch is imported.

    libgomp's threads spin for milliseconds by default. With more runnable threads than cores, a spinning
    thread takes CPU time from the one that it waits for: next to one busy process a step takes many times as
    long. `benchmarks/busy_machine.py` measures both. What the user has set in the environment is kept.
    """
    if not any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def setup_process() -> None:
    """Prepare this process for training on a CPU; harmless on a GPU. Call it before any other torch work.

    - Denormals are flushed to zero: ALiBi's steep heads push softmax weights into that range, where every
      exp and GEMM is slow. The setting is per thread and inherited, hence before torch starts its threads.
    - No more threads than cores that this process may use; fewer, where OMP_NUM_THREADS says so.
    - glibc keeps large blocks instead of returning them to the kernel, which would hand out every activation
      as fresh, unmapped pages again.
    """
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # The tokenizers' Rust pool warns at every fork after use; no fork here tokenizes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def return_large_blocks() -> None:
    """Let glibc return every block of 1 MiB or more when it is freed, which `setup_process` keeps it from.

    For a process that frees gathered weights block by block: what it keeps would be as much as it saves.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 65536)
            libc.mallopt(_M_MMAP_THRESHOLD, 2**20)


def release_freed_memory() -> None:
    """Return the pages of freed blocks to the system, which `setup_process` lets glibc keep."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def release_mapped_pages(address: int, size: int) -> None:
    """Take a mapped file's pages out of this process's memory; reading them again reads the file.

    ``address`` and ``size`` in bytes. Nothing happens where no file is mapped there, or not on Linux.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = -(-address // page) * page, (address + size) // page * page
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in span.split("-"))
        # anonymous memory, of inode 0, would lose its content
        if inode != "0" and start <= first < last <= end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def launched_processes() -> int:
    """How many processes a launcher such as torchrun has started for this job; 1 without one."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def pick_device(name: str) -> "torch.device":
    """The device of ``train.device``: "auto", "cpu" or "cuda"; of several processes each has its own GPU.

    Raises `UserError` for "cuda" where there is none, and for more processes on this machine than GPUs.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda, but torch finds no CUDA device here; choose auto or cpu")
    if name == "cuda" and launched_processes() > 1:
        index, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= devices:
            raise UserError(f"process {index} of this machine has no GPU: there are {devices}; start as many")
        return torch.device(name, index)
    return torch.device(name)


def dtype_of(precision: str) -> "torch.dtype":
    """The dtype that one of `PRECISIONS` stands for."""
    import torch

    return getattr(torch, PRECISIONS[precision])


def precision_of(dtype: "torch.dtype") -> str:
    """The one of `PRECISIONS` that stands for a dtype."""
    return next(name for name in PRECISIONS if dtype_of(name) == dtype)


def check_memory(what: str, least: int, device: "torch.device") -> None:
    """Raise `UserError` naming ``what`` if it takes ``least`` bytes and ``device`` has less memory."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if least > total:
        sizes = f"{least / 2**30:,.1f} GiB, there are {total / 2**30:,.1f}"
        raise UserError(f"{what}: takes at least {sizes}; lower it")


def usable_cores() -> int:
    """How many cores this process may use: by its affinity (taskset) and its cgroup's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(Path("/sys/fs/cgroup")))))


def _quota(cgroup: Path) -> float:
    """CPU quota, in cores, of the cgroup mounted at this folder; inf without a limit."""
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
