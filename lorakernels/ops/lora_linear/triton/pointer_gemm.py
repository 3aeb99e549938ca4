"""The GEMM with the update for any chip and any strides: operands by pointers and masks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.launching import launch
from lorakernels.ops.lora_linear.triton.dropout import dropout_keep
from lorakernels.ops.lora_linear.triton.order import GROUP_M, tile_origin
from lorakernels.ops.lora_linear.triton.parts import Parts
from lorakernels.ops.lora_linear.triton.target import precision
from lorakernels.ops.lora_linear.triton.tiles import Tile


@triton.jit
def add_block(
    acc, p_ptr, q_ptr, k, length, stride_p, stride_qn, stride_qk, row_ok, col_ok,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + p·qᵀ over the BLOCK_K columns from k on, of the length that there are."""
    rows, cols, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    k_ok = inner < length - k
    p = tl.load(
        p_ptr + k + rows[:, None] * stride_p + inner[None, :],
        mask=row_ok[:, None] & k_ok[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_K]
    q = tl.load(
        q_ptr + tl.cast(k, tl.int64) * stride_qk + inner[:, None] * stride_qk + cols[None, :] * stride_qn,
        mask=k_ok[:, None] & col_ok[None, :],
        other=0.0,
    )  # [BLOCK_K, BLOCK_N]
    return tl.dot(p, q, acc, input_precision=PRECISION)


@triton.jit
def lora_linear_gemm_kernel(
    # data: x [M, K], weight [N, K], bias [N], left [M, R], right [N, R], y [M, N]
    x_ptr,
    weight_ptr,
    bias_ptr,
    left_ptr,
    right_ptr,
    y_ptr,
    seed_ptr,
    # sizes
    M,
    N,
    K,
    R,
    # strides
    stride_xm,
    stride_wn,
    stride_wk,
    stride_lm,
    stride_rn,
    stride_rk,
    stride_ym,
    dropout_p,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x·weightᵀ + bias + drop'(left·rightᵀ); serves dx too, as dy·W + drop'(dS·A)."""
    first_row, first_col = tile_origin(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), BLOCK_M, BLOCK_N, GROUP_M
    )
    # tile bases in 64 bits, offsets inside a tile in 32
    x_tile_ptr = x_ptr + first_row.to(tl.int64) * stride_xm
    left_tile_ptr = left_ptr + first_row.to(tl.int64) * stride_lm
    weight_tile_ptr = weight_ptr + first_col.to(tl.int64) * stride_wn
    right_tile_ptr = right_ptr + first_col.to(tl.int64) * stride_rn
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_ok, col_ok = rows < M - first_row, cols < N - first_col

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    trips_k = tl.cdiv(K, BLOCK_K)
    trips = trips_k + tl.cdiv(R, BLOCK_K)
    if DROPOUT:
        # the mask acts on the update alone, which therefore goes first
        for k in range(0, R, BLOCK_K):
            acc = add_block(
                acc, left_tile_ptr, right_tile_ptr, k, R, stride_lm, stride_rn, stride_rk, row_ok, col_ok,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        keep = dropout_keep(seed_ptr, first_row.to(tl.int64) + rows, first_col, dropout_p, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
        trips = trips_k
    for trip in range(trips):
        # after the columns of (x, weight) the same pipelined loop continues over those of (left, right)
        update = trip >= trips_k
        acc = add_block(
            acc,
            tl.where(update, left_tile_ptr, x_tile_ptr),
            tl.where(update, right_tile_ptr, weight_tile_ptr),
            tl.where(update, trip - trips_k, trip) * BLOCK_K,
            tl.where(update, R, K),
            tl.where(update, stride_lm, stride_xm),
            tl.where(update, stride_rn, stride_wn),
            tl.where(update, stride_rk, stride_wk),
            row_ok, col_ok, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + first_col + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    y_tile_ptr = y_ptr + first_row.to(tl.int64) * stride_ym + first_col
    tl.store(
        y_tile_ptr + rows[:, None] * stride_ym + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=row_ok[:, None] & col_ok[None, :],
    )


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Parts,
    right: Parts,
    dropout_p: float,
    seed: Tensor,
    tile: Tile,
) -> Tensor:
    """x·weightᵀ + bias + drop'(left·rightᵀ), [M, N]; the columns of x [M, K] are adjacent."""
    (m, k), n = x.shape, weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    launch(
        lora_linear_gemm_kernel, (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        x, weight, x if bias is None else bias, left.values, right.values, y, seed,
        m, n, k, left.columns,
        x.stride(0), *weight.stride(), left.values.stride(0), *right.values.stride(), y.stride(0),
        dropout_p,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M,
        BIAS=bias is not None, DROPOUT=dropout_p > 0,
        PRECISION=precision(x), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
