"""What a training step costs and how well the machine is used: FLOPs counted, rates and memory measured."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from transformers import BloomForCausalLM

from bloomft.batch import IGNORE_INDEX, PADDING_ID, Batch
from lorakernels import LoRALinear, frozen_linear

FIRST_PROJECTION = "h.0.self_attention.query_key_value"
CONVENTION = "MFU: 4 FLOPs a frozen parameter and token, attention counted, recomputation not"


@dataclass(frozen=True)
class StepCost:
    """FLOPs that training a BLOOM with a frozen base needs; a multiplication and an addition count as two.

    A frozen linear layer costs 2·K·N a token forward and as much for its input's gradient; there is no third
    product, the weight's gradient, hence about 4 FLOPs a parameter and token and not 6. Its adapter costs
    2·r·(K + N) forward and 4·r·(K + N) backward. The first query_key_value needs no gradient of its input.
    The vocabulary head costs 4·V·H a label, attention 12·H a layer and visible (query, key) pair. Work done
    again (checkpointing, attention's backward) is left out: the model does not need it. `CONVENTION` says so
    beside every MFU.
    """

    per_token: float
    per_label: float
    per_pair: float

    @classmethod
    def of(cls, model: BloomForCausalLM) -> "StepCost":
        """Counted from the layers of a patched model."""
        per_token = 0.0
        for name, layer in model.transformer.h.named_modules(prefix="h"):
            if not isinstance(layer, torch.nn.Linear | LoRALinear):
                continue
            N, K = layer.weight.shape
            inputs = 0 if name == FIRST_PROJECTION else 1
            per_token += 2 * K * N * (1 + inputs)
            if isinstance(layer, LoRALinear):
                rows, r = layer.lora_b.shape
                per_token += 2 * r * K * (2 + inputs) + 2 * r * rows * 3
        V, H = model.lm_head.weight.shape
        return cls(per_token, 4.0 * V * H, 12.0 * H * len(model.transformer.h))

    def flops(self, counts: "BatchCounts") -> float:
        """FLOPs of one forward and backward pass over what ``counts`` counted."""
        return self.per_token * counts.tokens + self.per_label * counts.labels + self.per_pair * counts.pairs


@dataclass
class BatchCounts:
    """What a batch holds: tokens without padding, labels, and visible (query, key) pairs."""

    tokens: int = 0
    labels: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, batch: Batch) -> "BatchCounts":
        """Counted from labels and document_ids, both [B, T]."""
        document_ids = batch["document_ids"]
        real = document_ids != PADDING_ID
        rows = torch.arange(len(document_ids)).unsqueeze(1) * (int(document_ids.max()) + 1)
        lengths = torch.bincount((rows + document_ids)[real])
        pairs = int((lengths * (lengths + 1)).sum()) // 2
        return cls(int(real.sum()), int((batch["labels"] != IGNORE_INDEX).sum()), pairs)

    def __add__(self, other: "BatchCounts") -> "BatchCounts":
        return BatchCounts(self.tokens + other.tokens, self.labels + other.labels, self.pairs + other.pairs)


@torch.no_grad()
def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, rounds: int = 25) -> float:
    """FLOP/s of a square matrix product on ``device``, fastest of ``rounds``.

    On a CPU by the library and in the precision that `lorakernels` has found to be faster. The numbers are
    normal: products of ones take a GPU less power, and run faster than those of a step.
    """
    if device.type == "cuda":
        size *= 8
    # a generator of its own: a run's random numbers must not depend on what is measured
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, dtype=dtype, device=device, generator=generator)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        frozen_linear(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class GemmLimit:
    """The FLOP/s that MFU refers to: `gemm_rate`, measured again when a step exceeds it.

    Other work on the machine makes a measurement too small. What a step has reached is a lower bound of the
    limit, so that MFU is never above 1.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.rate = gemm_rate(device, dtype)

    def share(self, reached: float) -> float:
        """``reached``, in FLOP/s, as a share of the limit, at most 1."""
        if reached > self.rate:
            self.rate = max(gemm_rate(self._device, self._dtype), reached)
        return reached / self.rate

    def describe(self) -> str:
        """What MFU refers to, for the log."""
        return f"MFU: the share of {self.rate / 1e9:,.0f} GFLOP/s, measured here"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or the most that this process held in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
