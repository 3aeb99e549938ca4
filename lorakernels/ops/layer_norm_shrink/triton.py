"""A layer norm and the LoRA shrink of its result in one Triton kernel, which reads x from memory once.

A program has some whole rows. It goes over their columns twice, a block at a time: for mean and variance, by
the pairwise update of Chan, Golub and LeVeque (1979, https://doi.org/10.1007/978-3-642-51461-6_3), which
subtracts no large squares from each other; and, from the cache, for h and its product with A. Beside 16-bit x
a float32 A is multiplied in two 16-bit parts, high and low. Dropout is lora_linear's (`keep_mask`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.launching import launch
from lorakernels.ops.add_layer_norm.triton import with_whole_rows
from lorakernels.ops.layer_norm_shrink.reference import Problem, Results
from lorakernels.ops.lora_linear.triton.dropout import dropout_keep
from lorakernels.ops.lora_linear.triton.parts import FLOAT16_SHIFT, split_factor
from lorakernels.ops.lora_linear.triton.target import precision
from lorakernels.ops.lora_linear.triton.thin import ThinTile

# By element size and whether there is dropout, for ranks up to SMALL_RANK and above; of few registers, so
# that an H100 holds all programs of 8,192 16-bit rows at once, up to rank 64.
SMALL_RANK = 16
TILES = {
    (2, False): (ThinTile(16, 128, 4, 3), ThinTile(32, 64, 8, 3)),
    (2, True): (ThinTile(16, 128, 4, 3), ThinTile(32, 64, 8, 3)),
    # one stage: the pointers of more are too many registers
    (4, False): (ThinTile(16, 64, 4, 1), ThinTile(32, 32, 8, 1)),
    (4, True): (ThinTile(16, 64, 8, 1), ThinTile(32, 32, 8, 1)),
}


@triton.jit
def layer_norm_shrink_kernel(
    # data: x [M, K], norm_weight and norm_bias [K], lora_a [r, K]; h [M, K], s [M, r], mean and rstd [M]
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    lora_a_ptr,
    h_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    # sizes
    M,
    K,
    rank,
    # strides
    stride_xm,
    stride_ar,
    stride_ak,
    stride_hm,
    stride_sm,
    eps,
    scale,
    dropout_p,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = layer norm of x; s = scale·drop(h)·lora_aᵀ."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < M
    columns = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    x_row_ptr = x_ptr + rows[:, None] * stride_xm

    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # without a product in it a loop is pipelined on request only
    for k in tl.range(0, K, BLOCK_K, num_stages=4):
        ok = row_ok[:, None] & (columns < K - k)[None, :]
        x = tl.load(x_row_ptr + k + columns[None, :], mask=ok, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        count = tl.minimum(BLOCK_K, K - k).to(tl.float32)
        # what the block adds to the sum of squares about the mean of the columns before and its own together
        block_mean = tl.sum(x, 1) / count
        centred = tl.where(ok, x - block_mean[:, None], 0.0)
        delta = block_mean - mean
        share = count / (count + k)
        squares += tl.sum(centred * centred, 1) + delta * delta * (share * k)
        mean += delta * share
    rstd = 1.0 / tl.sqrt(squares / K + eps)
    tl.store(mean_ptr + rows, mean, mask=row_ok)
    tl.store(rstd_ptr + rows, rstd, mask=row_ok)

    acc = tl.zeros((BLOCK_M, 2 * BLOCK_R if SPLIT else BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        k_ok = columns < K - k
        ok = row_ok[:, None] & k_ok[None, :]
        x = tl.load(x_row_ptr + k + columns[None, :], mask=ok, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        norm_weight = tl.load(norm_weight_ptr + k + columns, mask=k_ok, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + k + columns, mask=k_ok, other=0.0).to(tl.float32)
        normed = (x - mean[:, None]) * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :]
        h = normed.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * stride_hm + k + columns[None, :], h, mask=ok)
        lora_a = tl.load(
            lora_a_ptr
            + tl.cast(k, tl.int64) * stride_ak
            + columns[:, None] * stride_ak
            + ranks[None, :] * stride_ar,
            mask=k_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            keep = dropout_keep(seed_ptr, rows, k, dropout_p, BLOCK_M, BLOCK_K)
            h = tl.where(keep, h, 0.0)
        if SPLIT:
            high, low = split_factor(lora_a, h.dtype, SHIFT)
            # side by side, rank by rank
            lora_a = tl.reshape(tl.join(high, low), (BLOCK_K, 2 * BLOCK_R))
        acc = tl.dot(h, lora_a, acc, input_precision=PRECISION)
    if SPLIT:
        high, low = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_R, 2)))
        acc = high + low * (1.0 / SHIFT)
    s_tile_ptr = s_ptr + rows[:, None] * stride_sm + ranks[None, :]
    tl.store(s_tile_ptr, acc * scale, mask=row_ok[:, None] & rank_ok[None, :])


def forward(problem: Problem) -> Results:
    """h, S, mean and rstd; M and K are not zero, and r is at most 128."""
    x, lora_a = with_whole_rows(problem.x), problem.lora_a
    (m, k), rank = x.shape, lora_a.shape[0]
    tile, columns = _tile_of(x, rank, problem.dropout_p), max(16, triton.next_power_of_2(k))
    h = torch.empty(m, k, dtype=x.dtype, device=x.device)
    s, mean, rstd = (torch.empty(m, size, dtype=torch.float32, device=x.device) for size in (rank, 1, 1))
    with torch.cuda.device_of(x):
        launch(
            layer_norm_shrink_kernel, (triton.cdiv(m, tile.rows),),
            x, problem.norm_weight.contiguous(), problem.norm_bias.contiguous(), lora_a,
            h, s, mean, rstd, problem.seed,
            m, k, rank,
            x.stride(0), lora_a.stride(0), lora_a.stride(1), h.stride(0), s.stride(0),
            problem.eps, problem.scale / (1 - problem.dropout_p), problem.dropout_p,
            BLOCK_M=tile.rows, BLOCK_K=min(tile.columns, columns),
            BLOCK_R=max(8 if x.dtype != lora_a.dtype else 16, triton.next_power_of_2(rank)),
            DROPOUT=problem.dropout_p > 0, SPLIT=x.dtype != lora_a.dtype,
            SHIFT=FLOAT16_SHIFT if x.dtype == torch.float16 else 1.0,
            PRECISION=precision(x), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return h, s, mean, rstd


def _tile_of(x: Tensor, rank: int, dropout_p: float) -> ThinTile:
    """What a program reads of x at a time."""
    small, large = TILES[x.element_size(), dropout_p > 0]
    return small if rank <= SMALL_RANK else large
