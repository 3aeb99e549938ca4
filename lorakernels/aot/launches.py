"""What is compiled: the shipped launches of every operator, on tensors without memory.

The launchers themselves run, so the specialisation that Triton derives (divisibility by 16, strides of 1) is
the one of a real call with aligned tensors, and no attribute is written by hand.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from lorakernels.aot.chips import Chip
from lorakernels.ops.linear_cross_entropy import triton as cross_entropy
from lorakernels.ops.lora_linear import triton as lora_linear

# dtype of x and weight, dtype of the adapters
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
}
M, N, K = 8192, 6144, 2048
RANKS = (16, 64)
DROPOUT = 0.1


@dataclass(frozen=True)
class Launch:
    """A call that compiles one kernel or more; role says what the main one is for, tile how it is cut."""

    role: str
    tile: str
    run: Callable[[], object]


def launches(chip: Chip, dtype: str) -> Iterator[Launch]:
    """Every shipped launch for that chip and dtype (a key of DTYPES)."""
    x_dtype, adapter_dtype = DTYPES[dtype]
    yield from _products(chip, x_dtype, adapter_dtype)
    for rank in RANKS:
        yield from _thin(x_dtype, adapter_dtype, rank)
    if x_dtype == adapter_dtype:
        yield from _cross_entropy(x_dtype)


def _products(chip: Chip, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Iterator[Launch]:
    x, dy, weight, bias = _meta(dtype, (M, K), (M, N), (N, K), (N,))
    by_columns = _meta(dtype, (K, N))[0].T
    width = 16 * lora_linear._parts(x, _meta(adapter_dtype, (1,))[0])
    left, b_rows, b_columns, a_rows, a_columns = _meta(
        dtype, (M, width), (N, width), (width, N), (K, width), (width, K)
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for tile in lora_linear.shipped_tiles(dtype, chip.shared_limit):

        def forward(tile=tile):
            return lora_linear._product(x, weight, bias, left, b_rows, 0.0, seed, tile)

        def dx(tile=tile):
            return lora_linear._product(dy, weight.T, None, left, a_columns.T, 0.0, seed, tile)

        def forward_by_columns(tile=tile):
            return lora_linear._product(x, by_columns, bias, left, b_columns.T, 0.0, seed, tile)

        def dx_by_columns(tile=tile):
            return lora_linear._product(dy, by_columns.T, None, left, a_rows, 0.0, seed, tile)

        yield Launch("forward", str(tile), forward)
        yield Launch("dx", str(tile), dx)
        yield Launch("forward, weight by columns", str(tile), forward_by_columns)
        yield Launch("dx, weight by columns", str(tile), dx_by_columns)
    for tile in lora_linear.shipped_tiles(dtype, chip.shared_limit, dropout=True):

        def dx_with_dropout(tile=tile):
            return lora_linear._product(dy, weight.T, None, left, a_columns.T, DROPOUT, seed, tile)

        yield Launch("dx with dropout", str(tile), dx_with_dropout)


def _thin(dtype: torch.dtype, adapter_dtype: torch.dtype, rank: int) -> Iterator[Launch]:
    x, dy = _meta(dtype, (M, K), (M, N))
    lora_a, lora_b = _meta(adapter_dtype, (rank, K), (N, rank))
    (s,) = _meta(torch.float32, (M, rank))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    name = f"rank {rank}"
    for p, suffix in ((0.0, ""), (DROPOUT, " with dropout")):
        yield Launch(f"shrink{suffix}", name, partial(lora_linear._shrink, x, lora_a, p, seed))
        yield Launch(f"adapter_grad dA{suffix}", name, partial(lora_linear._sum_over_rows, x, s, p, seed))
    yield Launch("adapter_grad dS dB", name, lambda: lora_linear._one_pass(dy, lora_b, s))
    sums = torch.empty(4, M, rank, dtype=torch.float32, device="meta")
    parts = lora_linear._parts(x, lora_a)
    yield Launch("reduce", name, lambda: lora_linear._reduce_and_pack(sums, rank, 2.0, dtype, parts))
    yield Launch("pack", name, lambda: lora_linear._pack(lora_b, x, rank_contiguous=True))


def _cross_entropy(dtype: torch.dtype) -> Iterator[Launch]:
    hidden, weight = _meta(dtype, (M, 1024), (250880, 1024))
    labels = torch.empty(M, dtype=torch.int64, device="meta")
    losses, row_gradient = _meta(torch.float32, (M,), (M,))
    (statistics,) = _meta(torch.float32, (M, 2))
    yield Launch("cross entropy forward", "row", lambda: cross_entropy.forward(hidden, weight, labels, True))
    yield Launch(
        "cross entropy weight gradient",
        "row",
        lambda: cross_entropy.weight_gradient(hidden, weight, labels, losses, statistics, row_gradient),
    )


def _meta(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
