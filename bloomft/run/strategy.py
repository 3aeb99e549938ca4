"""What the processes of a run hold of the base: all of it (ddp), or a share (fsdp)."""

from dataclasses import dataclass

import torch

from bloomft.config.keys import Config
from bloomft.errors import UserError
from bloomft.model.base import load_base
from bloomft.ranks import Ranks

# Of a GPU's memory; the rest is for activations.
LARGEST_SHARE = 0.5


@dataclass(frozen=True)
class Strategy:
    """The strategy of a run, ddp or fsdp, and why, in words for the log."""

    name: str
    reason: str

    def describe(self, ranks: Ranks) -> str:
        """A line for the log."""
        return f"processes: {ranks.size}, {self.name} ({self.reason})"


def choose_strategy(config: Config, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Strategy:
    """What ``train.strategy`` says; "auto" is fsdp where the base, in ``dtype``, takes over half of a GPU.

    One process has nothing to share. Raises `UserError` for ``train.cpu_offload`` without fsdp or GPUs.
    """
    offload, configured = config.train.cpu_offload, config.train.strategy
    if offload and (device.type == "cpu" or ranks.size == 1 or configured == "ddp"):
        raise UserError("train.cpu_offload: needs train.strategy fsdp, several processes and GPUs")
    if ranks.size == 1:
        return Strategy("ddp", "one process")
    if configured != "auto":
        return Strategy(configured, "as configured")
    if offload:
        return Strategy("fsdp", "train.cpu_offload")
    if device.type == "cpu":
        return Strategy("ddp", "auto on a CPU")
    return ranks.from_first(lambda: _strategy_for_gpu(config, device, dtype))


def _strategy_for_gpu(config: Config, device: torch.device, dtype: torch.dtype) -> Strategy:
    base = load_base(config.model.transformer, weights=False)
    size = sum(parameter.numel() for parameter in base.model.parameters()) * dtype.itemsize
    share = size / torch.cuda.get_device_properties(device).total_memory
    return Strategy("fsdp" if share > LARGEST_SHARE else "ddp", f"the base takes {share:.0%} of a GPU")
