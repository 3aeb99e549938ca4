"""The thin products: those of x or dy, which are long, with a factor of few columns.

    S = s·drop(x)·Aᵀ, dS = s·dy·B       a sum over a row, which one program makes whole, in parts for the GEMM
    dA = dSᵀ·drop(x), dB = dyᵀ·S        a sum over rows, split among programs: partial sums, added in order
    dS and dB together                  one pass over dy, where the rank is small

They are bound by the memory that x or dy is read from; a factor comes in the parts of `parts`. Sums are in
float32.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.launching import launch
from lorakernels.ops.lora_linear.problem import ALIGNMENT
from lorakernels.ops.lora_linear.triton.dropout import dropout_keep
from lorakernels.ops.lora_linear.triton.parts import LEFT, Layout, Parts, store_parts
from lorakernels.ops.lora_linear.triton.target import precision, thin_options


@dataclass(frozen=True)
class ThinTile:
    """Rows and columns of x or dy that a program reads at a time, warps and pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# By bytes of an element and ranks of a block, which are 16, 32 or 64.
SHRINK_TILES = {
    (2, 16): ThinTile(32, 128, 4, 4),
    (2, 32): ThinTile(32, 128, 4, 3),
    (2, 64): ThinTile(64, 128, 8, 3),
    (4, 16): ThinTile(32, 64, 4, 3),
    (4, 32): ThinTile(32, 64, 4, 3),
    (4, 64): ThinTile(32, 32, 8, 3),
}
PASS_TILES = {2: ThinTile(64, 256, 8, 3), 4: ThinTile(32, 64, 8, 2)}
SUM_TILES = {
    (2, 16): ThinTile(64, 128, 8, 4),
    (2, 32): ThinTile(64, 128, 8, 3),
    (2, 64): ThinTile(32, 128, 8, 4),
    (4, 16): ThinTile(32, 64, 8, 3),
    (4, 32): ThinTile(32, 64, 8, 3),
    (4, 64): ThinTile(32, 64, 8, 2),
}
# Fewer rows than this make too few programs of a shrink: they take blocks of 16.
FEW_ROWS = 4096
# Programs that a sum over rows is split into, by ranks of a block: constants, so that all devices add in one
# order. On an H200, which has 132 multiprocessors, three or two programs each were fastest, at 64 ranks one.
PASS_PROGRAMS = 264
SUM_PROGRAMS = {16: 396, 32: 264, 64: 132}


@triton.jit
def add_product(
    high_sum, low_sum, x, high, low, LOW: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr
):
    """high_sum + x·high and low_sum + x·low, in one sum where low is not shifted."""
    high_sum = tl.dot(x, high, high_sum, input_precision=PRECISION)
    if LOW:
        if SHIFT == 1.0:
            high_sum = tl.dot(x, low, high_sum)
        else:
            low_sum = tl.dot(x, low, low_sum)
    return high_sum, low_sum


@triton.jit
def lora_linear_shrink_kernel(
    # data: x [M, K], the parts of factor [K, r], s [M, r], the parts of s
    x_ptr,
    factor_ptr,
    s_ptr,
    left_ptr,
    seed_ptr,
    # sizes
    M,
    K,
    rank,
    # strides
    stride_xm,
    stride_fk,
    stride_fr,
    stride_sm,
    stride_lm,
    scale,
    dropout_p,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    LOW: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = scale·drop(x)·factor, as it is where WIDE, and in parts."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < M - first_row
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    x_tile_ptr = x_ptr + first_row.to(tl.int64) * stride_xm
    factor_tile_ptr = factor_ptr + columns[:, None] * stride_fk + ranks[None, :].to(tl.int64) * stride_fr
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    low_total = total
    for k in range(0, K, BLOCK_K):
        k_ok = columns < K - k
        x = tl.load(
            x_tile_ptr + k + rows[:, None] * stride_xm + columns[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        at = factor_tile_ptr + tl.cast(k, tl.int64) * stride_fk
        high = tl.load(at, mask=k_ok[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
        low = high
        if LOW:
            low = tl.load(at + LOW * tl.cast(stride_fr, tl.int64), mask=k_ok[:, None], other=0.0)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, first_row.to(tl.int64) + rows, k, dropout_p, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        total, low_total = add_product(total, low_total, x, high, low, LOW, SHIFT, PRECISION)
    if SHIFT != 1.0:
        total += low_total * (1.0 / SHIFT)
    total *= scale
    if WIDE:
        tl.store(
            s_ptr + first_row.to(tl.int64) * stride_sm + rows[:, None] * stride_sm + ranks[None, :],
            total,
            mask=row_ok[:, None] & (ranks < rank)[None, :],
        )
    left_tile_ptr = left_ptr + first_row.to(tl.int64) * stride_lm + rows[:, None] * stride_lm + ranks[None, :]
    store_parts(left_tile_ptr, total, row_ok[:, None], WIDTH, LEFT, PARTS, SHIFT)


@triton.jit
def lora_linear_backward_kernel(
    # data: dy [M, N], the parts of b [N, r] and s [M, r], ds_partial [N blocks, M, RANKS],
    # db_partial [splits, N, RANKS]
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_partial_ptr,
    db_partial_ptr,
    # sizes
    M,
    N,
    split_length,
    # strides
    stride_dym,
    stride_bn,
    stride_br,
    stride_sm,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    B_LOW: tl.constexpr,
    S_LOW: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over dy: ds_partial[N block] = dy·b, db_partial[split] = dyᵀ·s."""
    first_col = tl.program_id(0) * BLOCK_N
    cols, rows, ranks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    col_ok, kept = cols < N - first_col, ranks < RANKS
    begin = tl.program_id(1) * split_length
    end = tl.minimum(begin + split_length, M)
    b_at = (
        b_ptr + (first_col + cols).to(tl.int64)[:, None] * stride_bn + ranks[None, :].to(tl.int64) * stride_br
    )
    b_high = tl.load(b_at, mask=col_ok[:, None], other=0.0)  # [BLOCK_N, BLOCK_R]
    b_low = b_high
    if B_LOW:
        b_low = tl.load(b_at + B_LOW * tl.cast(stride_br, tl.int64), mask=col_ok[:, None], other=0.0)
    ds_tile_ptr = ds_partial_ptr + tl.program_id(0).to(tl.int64) * M * RANKS
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    db_low = db
    for m in range(begin, end, BLOCK_M):
        row_ok = rows < end - m
        first_row = tl.cast(m, tl.int64)
        dy = tl.load(
            dy_ptr + first_row * stride_dym + first_col + rows[:, None] * stride_dym + cols[None, :],
            mask=row_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        s_at = s_ptr + first_row * stride_sm + rows[:, None] * stride_sm + ranks[None, :]
        s_high = tl.load(s_at, mask=row_ok[:, None], other=0.0)  # [BLOCK_M, BLOCK_R]
        s_low = s_high
        if S_LOW:
            s_low = tl.load(s_at + S_LOW, mask=row_ok[:, None], other=0.0)
        db, db_low = add_product(db, db_low, tl.trans(dy), s_high, s_low, S_LOW, SHIFT, PRECISION)
        zero = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        ds, ds_low = add_product(zero, zero, dy, b_high, b_low, B_LOW, SHIFT, PRECISION)
        if SHIFT != 1.0:
            ds += ds_low * (1.0 / SHIFT)
        tl.store(
            ds_tile_ptr + first_row * RANKS + rows[:, None] * RANKS + ranks[None, :],
            ds,
            mask=row_ok[:, None] & kept[None, :],
        )
    if SHIFT != 1.0:
        db += db_low * (1.0 / SHIFT)
    db_tile_ptr = db_partial_ptr + (tl.program_id(1).to(tl.int64) * N + first_col) * RANKS
    tl.store(db_tile_ptr + cols[:, None] * RANKS + ranks[None, :], db, mask=col_ok[:, None] & kept[None, :])


@triton.jit
def lora_linear_sum_kernel(
    # data: x [M, K], the parts of factor [M, r], partial [splits, K, RANKS]
    x_ptr,
    factor_ptr,
    partial_ptr,
    seed_ptr,
    # sizes
    M,
    K,
    split_length,
    # strides
    stride_xm,
    stride_fm,
    dropout_p,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    LOW: tl.constexpr,
    SHIFT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial[split] = drop(x)ᵀ·factor over the split's rows."""
    first_col = tl.program_id(0) * BLOCK_K
    cols, rows = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    col_ok = cols < K - first_col
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * split_length
    end = tl.minimum(begin + split_length, M)
    total = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    low_total = total
    for m in range(begin, end, BLOCK_M):
        row_ok = rows < end - m
        first_row = tl.cast(m, tl.int64)
        x = tl.load(
            x_ptr + first_row * stride_xm + first_col + rows[:, None] * stride_xm + cols[None, :],
            mask=row_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        at = factor_ptr + first_row * stride_fm + rows[:, None] * stride_fm + ranks[None, :]
        high = tl.load(at, mask=row_ok[:, None], other=0.0)  # [BLOCK_M, BLOCK_R]
        low = high
        if LOW:
            low = tl.load(at + LOW, mask=row_ok[:, None], other=0.0)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, first_row + rows, first_col, dropout_p, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        total, low_total = add_product(total, low_total, tl.trans(x), high, low, LOW, SHIFT, PRECISION)
    if SHIFT != 1.0:
        total += low_total * (1.0 / SHIFT)
    partial_tile_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * K + first_col) * RANKS
    tl.store(
        partial_tile_ptr + cols[:, None] * RANKS + ranks[None, :],
        total,
        mask=col_ok[:, None] & (ranks < RANKS)[None, :],
    )


def shrink(
    layout: Layout, x: Tensor, factor: Parts, scale: float, dropout_p: float, seed: Tensor, *, wide: bool
) -> tuple[Tensor, Parts]:
    """scale·drop(x)·factor for x [M, K] and factor [K, r]: [M, r] in float32, and its parts.

    Where not wide, the float32 tensor has no rows.
    """
    m, k = x.shape
    tile = _narrowed(SHRINK_TILES[x.element_size(), layout.block], x, dropout_p)
    block_m = tile.rows if m > FEW_ROWS else 16
    s = torch.empty(m if wide else 0, layout.rank, dtype=torch.float32, device=x.device)
    left = layout.left(m, x, layout.parts)
    launch(
        lora_linear_shrink_kernel, (triton.cdiv(m, block_m), layout.width // layout.block),
        x, factor.values, s, left.values, seed,
        m, k, layout.rank,
        x.stride(0), *factor.values.stride(), s.stride(0), left.values.stride(0),
        scale, dropout_p,
        BLOCK_M=block_m, BLOCK_K=tile.columns, BLOCK_R=layout.block, WIDTH=layout.width,
        PARTS=layout.parts, LOW=factor.low, SHIFT=layout.shift, WIDE=wide, DROPOUT=dropout_p > 0,
        PRECISION=precision(x), **thin_options(x, tile.num_warps, tile.num_stages),
    )  # fmt: skip
    return s, left


def both_thin_gradients(layout: Layout, dy: Tensor, b: Parts, s: Parts) -> tuple[Tensor, Tensor]:
    """Partial sums of dy·B [N blocks, M, ranks] and dyᵀ·S [splits, N, ranks], in one pass over dy [M, N]."""
    m, n = dy.shape
    tile = _narrowed(PASS_TILES[dy.element_size()], dy, 0.0)
    blocks = triton.cdiv(n, tile.columns)
    splits, length = _split(m, tile.rows, PASS_PROGRAMS // blocks)
    ranks = layout.partial_ranks
    ds = torch.empty(blocks, m, ranks, dtype=torch.float32, device=dy.device)
    db = torch.empty(splits, n, ranks, dtype=torch.float32, device=dy.device)
    launch(
        lora_linear_backward_kernel, (blocks, splits),
        dy, b.values, s.values, ds, db,
        m, n, length,
        dy.stride(0), *b.values.stride(), s.values.stride(0),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=layout.block, RANKS=ranks,
        B_LOW=b.low, S_LOW=s.low, SHIFT=layout.shift,
        PRECISION=precision(dy), **thin_options(dy, tile.num_warps, tile.num_stages),
    )  # fmt: skip
    return ds, db


def sum_over_rows(layout: Layout, x: Tensor, factor: Parts, dropout_p: float, seed: Tensor) -> Tensor:
    """Partial sums [splits, K, ranks] of drop(x)ᵀ·factor for x [M, K] and a left factor [M, r]."""
    m, k = x.shape
    tile = _narrowed(SUM_TILES[x.element_size(), layout.block], x, dropout_p)
    blocks, rank_blocks = triton.cdiv(k, tile.columns), layout.width // layout.block
    splits, length = _split(m, tile.rows, SUM_PROGRAMS[layout.block] // (blocks * rank_blocks))
    partial = torch.empty(splits, k, layout.partial_ranks, dtype=torch.float32, device=x.device)
    launch(
        lora_linear_sum_kernel, (blocks, splits, rank_blocks),
        x, factor.values, partial, seed,
        m, k, length,
        x.stride(0), factor.values.stride(0),
        dropout_p,
        BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=layout.block, RANKS=layout.partial_ranks,
        LOW=factor.low, SHIFT=layout.shift, DROPOUT=dropout_p > 0,
        PRECISION=precision(x), **thin_options(x, tile.num_warps, tile.num_stages),
    )  # fmt: skip
    return partial


def _narrowed(tile: ThinTile, x: Tensor, dropout_p: float) -> ThinTile:
    """tile with half the columns for the mask's registers, and for those of each element's own address."""
    unaligned = x.stride(0) * x.element_size() % ALIGNMENT != 0
    return replace(tile, columns=tile.columns >> (unaligned + (dropout_p > 0)))


def _split(length: int, block: int, parts: int) -> tuple[int, int]:
    """Into how many parts, at most, and of what length, a sum over length is split, in whole blocks."""
    trips = triton.cdiv(length, block)
    part = triton.cdiv(trips, max(1, min(trips, parts))) * block
    return triton.cdiv(length, part), part
