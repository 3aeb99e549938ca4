"""Settings of the whole process, made once, before the first tensor is computed."""

import ctypes
import os
import sys

import torch

from bloomft.errors import UserError
from bloomft.threads import usable_cores

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def setup_process() -> None:
    """Prepare this process for training on a CPU; harmless on a GPU. Call it before any other torch work.

    - Denormals are flushed to zero: ALiBi's steep heads push softmax weights into that range, where every
      exp and GEMM crawls. The setting is per thread and inherited, hence before torch starts its thread pool.
    - No more threads than cores that this process may use; fewer, where OMP_NUM_THREADS says so.
    - glibc keeps large blocks instead of returning them to the kernel, which would hand out every activation
      as fresh, unmapped pages again.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # The tokenizers' Rust pool warns at every fork after use; no fork here tokenizes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def release_freed_memory() -> None:
    """Give the pages of freed blocks back to the system, which `setup_process` lets glibc keep."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def pick_device(name: str) -> torch.device:
    """The device of ``train.device``: "auto", "cpu" or "cuda". `UserError` for "cuda" where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda, but torch finds no CUDA device here; choose auto or cpu")
    return torch.device(name)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of ``train.precision`` on ``device``: "auto" is bfloat16 on CUDA, float32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
