"""The seeds of the adapters' dropout: one number a micro-batch, from which every layer has its own."""

from collections.abc import Collection

import torch
from torch import Tensor

from bloomft.ranks import Ranks
from lorakernels import LoRALinear

# An odd number near 2**64 divided by the golden ratio: multiples of it, modulo 2**64, are far from each other
# (Knuth, The Art of Computer Programming, volume 3, section 6.4).
STEP = 0x9E3779B97F4A7C15 - 2**64


class DropoutSeeds:
    """The `LoRALinear.dropout_seed` of every layer, in one tensor that keeps its place.

    A layer's seed is that of the micro-batch plus `STEP` times the layer's number, modulo 2**64: computed on
    the device, distinct in every layer, and the same where blocks are recomputed.

    Attributes:
        used: whether any layer drops anything.
    """

    def __init__(self, layers: Collection[LoRALinear], device: torch.device) -> None:
        self.used = any(layer.dropout_p > 0 for layer in layers)
        if not self.used:
            return
        numbers = torch.arange(len(layers), device=device)
        # each at the start of 16 bytes: a kernel is compiled again for a pointer that is not aligned to them
        self._offsets = (numbers * STEP)[:, None].repeat(1, 2)
        self._seeds = torch.zeros_like(self._offsets)
        for layer, row in zip(layers, self._seeds, strict=True):
            layer.dropout_seed = row[:1]

    def draw(self, ranks: Ranks) -> Tensor:
        """The seed of a micro-batch, int64 [1] on the CPU, from torch's generator, which checkpoints hold.

        Every process draws those of all processes, so that a seed belongs to rows and not to a process.
        """
        drawn = [torch.empty(1, dtype=torch.int64).random_() for _ in range(ranks.size)]
        return drawn[ranks.rank]

    def set(self, seed: Tensor) -> None:
        """Give every layer its seed for the micro-batch of ``seed`` [1], on the layers' device."""
        torch.add(self._offsets, seed, out=self._seeds)
