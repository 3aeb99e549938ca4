"""The dtype of a run's frozen base: configured, remembered by its checkpoint, or measured."""

import functools
from dataclasses import dataclass

import torch

from bloomft.accounting import gemm_rate
from bloomft.process import dtype_of
from bloomft.progress import waiting

# 16 bits round more coarsely, so their products must be faster by more than a busy machine's noise.
ADVANTAGE = 1.5


@dataclass(frozen=True)
class Precision:
    """One of `bloomft.process.PRECISIONS`, and why it was taken, in words for the log."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen base."""
        return dtype_of(self.name)


def choose_precision(configured: str, device: torch.device, remembered: str | None) -> Precision:
    """What ``train.precision`` says; for "auto" that of the checkpoint, ``remembered``, where there is one.

    Otherwise "auto" is bf16 on CUDA. On a CPU it is bf16 where products of 16 bits are `ADVANTAGE` times as
    fast as those of float32, measured here, and fp32 elsewhere.
    """
    if configured != "auto":
        changed = remembered is not None and remembered != configured
        was = f", {remembered} in the checkpoint" if changed else ""
        return Precision(configured, f"as configured{was}")
    if remembered is not None:
        return Precision(remembered, "as in the checkpoint")
    if device.type == "cuda":
        return Precision("bf16", "auto on CUDA")
    ratio = _rate_of_16_bits(device, torch.get_num_threads())
    name = "bf16" if ratio >= ADVANTAGE else "fp32"
    return Precision(name, f"auto; products in bf16 run at {ratio:.1f} x fp32's rate here")


@functools.cache
def _rate_of_16_bits(device: torch.device, _threads: int) -> float:
    """The rate of bfloat16 products over float32's; a process measures it once for a number of threads."""
    with waiting("measuring bf16 and fp32"):
        return gemm_rate(device, torch.bfloat16) / gemm_rate(device, torch.float32)
