"""What kernels depend on besides their tensors: the device's kind, and how torch is told to multiply."""

import torch
import triton
from torch import Tensor

from lorakernels.dispatch import device_properties


def precision(x: Tensor) -> str:
    """How tl.dot treats float32 operands: as torch's own matrix products are told to."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and _target(x) == ("cuda", 32) else "ieee"


def thin_options(x: Tensor, num_warps: int, num_stages: int) -> dict[str, int]:
    """Warps and pipeline stages of a thin kernel where x is: half of both on AMD's GPUs.

    Their warps have 64 lanes, and MI300X has 64 KiB of shared memory.
    """
    backend, lanes = _target(x)
    stages = min(num_stages, 2) if backend == "hip" else num_stages
    return {"num_warps": min(num_warps, 256 // lanes), "num_stages": stages}


def _target(x: Tensor) -> tuple[str, int]:
    """Backend and lanes of a warp where x is; the interpreter has neither."""
    if x.device.type == "cpu":
        return "interpreter", 32
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


def multiprocessors(device: torch.device) -> int:
    """How many the device has; the interpreter is given a few, so that each has several tiles."""
    if device.type == "cpu":
        return 4
    return device_properties(device).multi_processor_count
