"""The dropout mask inside kernels: `reference.keep_mask`, a block at a time."""

import triton
import triton.language as tl

from lorakernels.ops.lora_linear import reference

PHILOX_ROUNDS = tl.constexpr(reference.PHILOX_ROUNDS)


@triton.jit
def dropout_keep(seed_ptr, rows, first_column, dropout_p, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Keep mask [BLOCK_M, BLOCK] of the columns from first_column (a multiple of 4) on, rows in int64."""
    groups = first_column // 4 + tl.arange(0, BLOCK // 4)
    low, high = rows.to(tl.int32)[:, None], (rows >> 32).to(tl.int32)[:, None]
    # four columns a counter: one Philox call yields four words
    a, b, c, d = tl.philox(tl.load(seed_ptr), groups[None, :], low, high, tl.zeros_like(low), PHILOX_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_M, BLOCK])
    return (words >> 8).to(tl.float32) * (1.0 / 16777216.0) >= dropout_p
