"""The Triton kernels of the LoRA linear; triton.py launches them and explains how they fit together."""

import triton
import triton.language as tl

from lorakernels.ops.lora_linear import reference

# as in reference.keep_mask, which makes the same mask
PHILOX_ROUNDS = tl.constexpr(reference.PHILOX_ROUNDS)
# Layouts of a factor in 16 bits, of up to three parts: [high | low | high] left, [high | high | low] right.
UNPACKED, PACKED_LEFT, PACKED_RIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def dropout_keep(seed_ptr, rows, first_column, dropout_p, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """Keep mask [BLOCK_M, BLOCK] of the columns from first_column (a multiple of 4) on, rows in int64."""
    groups = first_column // 4 + tl.arange(0, BLOCK // 4)
    low, high = rows.to(tl.int32)[:, None], (rows >> 32).to(tl.int32)[:, None]
    # four columns a counter: one Philox call yields four words
    a, b, c, d = tl.philox(tl.load(seed_ptr), groups[None, :], low, high, tl.zeros_like(low), PHILOX_ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_M, BLOCK])
    return (words >> 8).to(tl.float32) * (1.0 / 16777216.0) >= dropout_p


@triton.jit
def split_factor(factor, dtype: tl.constexpr, SHIFT: tl.constexpr):
    """A float32 factor as 16-bit ones, high + mid / SHIFT + low / SHIFT²; SHIFT serves float16's range."""
    high = factor.to(dtype)
    rest = (factor - high.to(tl.float32)) * SHIFT
    mid = rest.to(dtype)
    return high, mid, ((rest - mid.to(tl.float32)) * SHIFT).to(dtype)


@triton.jit
def join_sums(high, mid, low, SHIFT: tl.constexpr):
    """The product with a factor out of those with its three parts."""
    return high + (mid + low * (1.0 / SHIFT)) * (1.0 / SHIFT)


@triton.jit
def lora_linear_shrink_kernel(
    # data: x [M, K], factor [r, K], partial [splits, M, padded rank]
    x_ptr,
    factor_ptr,
    partial_ptr,
    seed_ptr,
    # sizes
    M,
    K,
    rank,
    split_length,
    # strides
    stride_xm,
    stride_fr,
    stride_fk,
    stride_ps,
    stride_pm,
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
    """partial[split] = drop(x)·factorᵀ over the split's columns."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < M - first_row
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    columns = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * split_length
    end = tl.minimum(begin + split_length, K)
    x_tile_ptr = x_ptr + first_row.to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_mid, acc_low = acc, acc
    for k in range(begin, end, BLOCK_K):
        k_ok = columns < end - k
        x = tl.load(
            x_tile_ptr + k + rows[:, None] * stride_xm + columns[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        factor = tl.load(
            factor_ptr
            + tl.cast(k, tl.int64) * stride_fk
            + columns[:, None] * stride_fk
            + ranks[None, :] * stride_fr,
            mask=k_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_R]
        if DROPOUT:
            keep = dropout_keep(seed_ptr, first_row.to(tl.int64) + rows, k, dropout_p, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if SPLIT:
            high, mid, low = split_factor(factor, x.dtype, SHIFT)
            acc = tl.dot(x, high, acc)
            acc_mid = tl.dot(x, mid, acc_mid)
            acc_low = tl.dot(x, low, acc_low)
        else:
            acc = tl.dot(x, factor, acc, input_precision=PRECISION)
    if SPLIT:
        acc = join_sums(acc, acc_mid, acc_low, SHIFT)
    partial_tile_ptr = (
        partial_ptr + tl.program_id(1).to(tl.int64) * stride_ps + first_row.to(tl.int64) * stride_pm
    )
    tl.store(partial_tile_ptr + rows[:, None] * stride_pm + ranks[None, :], acc, mask=row_ok[:, None])


@triton.jit
def lora_linear_reduce_kernel(
    # data: partial [count, rows, ranks], wide [rows, ranks], packed [rows, PARTS * padded rank]
    partial_ptr,
    wide_ptr,
    packed_ptr,
    # sizes
    count,
    n_rows,
    rank,
    padded_rank,
    # strides
    stride_pc,
    stride_pm,
    stride_pr,
    stride_wm,
    stride_wr,
    stride_km,
    stride_kr,
    scale,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """wide = scale·Σ partial, and the same as a factor of the GEMM, its rank padded with zeros."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = (rows < n_rows)[:, None] & (ranks < rank)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for index in range(count):
        tile_ptr = partial_ptr + tl.cast(index, tl.int64) * stride_pc
        total += tl.load(
            tile_ptr + rows[:, None] * stride_pm + ranks[None, :].to(tl.int64) * stride_pr, mask=ok, other=0.0
        ).to(tl.float32)
    total *= scale
    if WIDE:
        tl.store(
            wide_ptr + rows[:, None] * stride_wm + ranks[None, :].to(tl.int64) * stride_wr, total, mask=ok
        )
    if LAYOUT != UNPACKED:
        packed_ok = (rows < n_rows)[:, None] & (ranks < padded_rank)[None, :]
        out_ptr = packed_ptr + rows[:, None] * stride_km + ranks[None, :].to(tl.int64) * stride_kr
        high = total.to(packed_ptr.dtype.element_ty)
        tl.store(out_ptr, high, mask=packed_ok)
        low = (total - high.to(tl.float32)).to(packed_ptr.dtype.element_ty)
        if PARTS > 1:
            second = low if LAYOUT == PACKED_LEFT else high
            tl.store(out_ptr + tl.cast(padded_rank, tl.int64) * stride_kr, second, mask=packed_ok)
        if PARTS > 2:
            third = high if LAYOUT == PACKED_LEFT else low
            tl.store(out_ptr + tl.cast(padded_rank, tl.int64) * 2 * stride_kr, third, mask=packed_ok)


@triton.jit
def lora_linear_forward_kernel(
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
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # rows of tiles in groups, so that programs that run together share operands in the L2 cache
    group = tl.program_id(0) // (GROUP_M * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * blocks_n)
    first_row = (group * GROUP_M + within % group_rows) * BLOCK_M
    first_col = (within // group_rows) * BLOCK_N

    # tile bases in 64 bits, offsets inside a tile in 32
    x_tile_ptr = x_ptr + first_row.to(tl.int64) * stride_xm
    left_tile_ptr = left_ptr + first_row.to(tl.int64) * stride_lm
    weight_tile_ptr = weight_ptr + first_col.to(tl.int64) * stride_wn
    right_tile_ptr = right_ptr + first_col.to(tl.int64) * stride_rn
    rows, cols, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_ok, col_ok = rows < M - first_row, cols < N - first_col

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    trips_k = tl.cdiv(K, BLOCK_K)
    trips = trips_k + tl.cdiv(R, BLOCK_K)
    if DROPOUT:
        # the mask acts on the update alone, which therefore goes first
        for k in range(0, R, BLOCK_K):
            k_ok = inner < R - k
            left = tl.load(
                left_tile_ptr + k + rows[:, None] * stride_lm + inner[None, :],
                mask=row_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            right = tl.load(
                right_tile_ptr
                + tl.cast(k, tl.int64) * stride_rk
                + inner[:, None] * stride_rk
                + cols[None, :] * stride_rn,
                mask=k_ok[:, None] & col_ok[None, :],
                other=0.0,
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        keep = dropout_keep(seed_ptr, first_row.to(tl.int64) + rows, first_col, dropout_p, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
        trips = trips_k
    for trip in range(trips):
        # after the columns of (x, weight) the same pipelined loop continues over those of (left, right)
        update = trip >= trips_k
        k = tl.where(update, trip - trips_k, trip) * BLOCK_K
        k_ok = inner < tl.where(update, R, K) - k
        p_ptr = tl.where(update, left_tile_ptr, x_tile_ptr)
        q_ptr = tl.where(update, right_tile_ptr, weight_tile_ptr)
        stride_p = tl.where(update, stride_lm, stride_xm)
        stride_qn = tl.where(update, stride_rn, stride_wn)
        stride_qk = tl.where(update, stride_rk, stride_wk)
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
        acc = tl.dot(p, q, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias_ptr + first_col + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    y_tile_ptr = y_ptr + first_row.to(tl.int64) * stride_ym + first_col
    tl.store(
        y_tile_ptr + rows[:, None] * stride_ym + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=row_ok[:, None] & col_ok[None, :],
    )


@triton.jit
def lora_linear_backward_kernel(
    # data: dy [M, N], factor [N, r], s [M, r], padded ranks in ds_partial [splits, M] and db_partial [blocks,
    # N]
    dy_ptr,
    factor_ptr,
    s_ptr,
    ds_partial_ptr,
    db_partial_ptr,
    # sizes
    M,
    N,
    rank,
    split_length,
    # strides
    stride_dym,
    stride_fn,
    stride_fr,
    stride_sm,
    stride_dss,
    stride_dsm,
    stride_dbm,
    stride_dbn,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT_FACTOR: tl.constexpr,
    SPLIT_S: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over dy: ds_partial[split] = dy·factor, db_partial[M block] = dyᵀ·s."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < M - first_row
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    cols = tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * split_length
    end = tl.minimum(begin + split_length, N)
    dy_tile_ptr = dy_ptr + first_row.to(tl.int64) * stride_dym
    db_tile_ptr = db_partial_ptr + tl.program_id(0).to(tl.int64) * stride_dbm
    s = tl.load(
        s_ptr + first_row.to(tl.int64) * stride_sm + rows[:, None] * stride_sm + ranks[None, :],
        mask=row_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_R]
    if SPLIT_S:
        s_high, s_mid, s_low = split_factor(s, dy_ptr.dtype.element_ty, SHIFT)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc_mid, acc_low = acc, acc
    for n in range(begin, end, BLOCK_N):
        col_ok = cols < end - n
        dy = tl.load(
            dy_tile_ptr + n + rows[:, None] * stride_dym + cols[None, :],
            mask=row_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_N]
        factor = tl.load(
            factor_ptr
            + tl.cast(n, tl.int64) * stride_fn
            + cols[:, None] * stride_fn
            + ranks[None, :] * stride_fr,
            mask=col_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_R]
        if SPLIT_FACTOR:
            high, mid, low = split_factor(factor, dy.dtype, SHIFT)
            acc = tl.dot(dy, high, acc)
            acc_mid = tl.dot(dy, mid, acc_mid)
            acc_low = tl.dot(dy, low, acc_low)
        else:
            acc = tl.dot(dy, factor, acc, input_precision=PRECISION)
        dy_t = tl.trans(dy)
        if SPLIT_S:
            db = join_sums(tl.dot(dy_t, s_high), tl.dot(dy_t, s_mid), tl.dot(dy_t, s_low), SHIFT)
        else:
            db = tl.dot(dy_t, s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
        tl.store(
            db_tile_ptr + tl.cast(n, tl.int64) * stride_dbn + cols[:, None] * stride_dbn + ranks[None, :],
            db,
            mask=col_ok[:, None],
        )
    if SPLIT_FACTOR:
        acc = join_sums(acc, acc_mid, acc_low, SHIFT)
    ds_tile_ptr = (
        ds_partial_ptr + tl.program_id(1).to(tl.int64) * stride_dss + first_row.to(tl.int64) * stride_dsm
    )
    tl.store(ds_tile_ptr + rows[:, None] * stride_dsm + ranks[None, :], acc, mask=row_ok[:, None])


@triton.jit
def lora_linear_backward_a_kernel(
    # data: x [M, K], ds [M, r], partial [splits, K, padded rank]
    x_ptr,
    ds_ptr,
    partial_ptr,
    seed_ptr,
    # sizes
    M,
    K,
    rank,
    split_length,
    # strides
    stride_xm,
    stride_dm,
    stride_ps,
    stride_pk,
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
    """partial[split] = drop(x)ᵀ·ds over the split's rows: the terms of dAᵀ."""
    first_col = tl.program_id(0) * BLOCK_K
    cols = tl.arange(0, BLOCK_K)
    col_ok = cols < K - first_col
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < rank
    rows = tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * split_length
    end = tl.minimum(begin + split_length, M)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    acc_mid, acc_low = acc, acc
    for m in range(begin, end, BLOCK_M):
        row_ok = rows < end - m
        x = tl.load(
            x_ptr + tl.cast(m, tl.int64) * stride_xm + first_col + rows[:, None] * stride_xm + cols[None, :],
            mask=row_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        ds = tl.load(
            ds_ptr + tl.cast(m, tl.int64) * stride_dm + rows[:, None] * stride_dm + ranks[None, :],
            mask=row_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            keep = dropout_keep(seed_ptr, tl.cast(m, tl.int64) + rows, first_col, dropout_p, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        x_t = tl.trans(x)
        if SPLIT:
            high, mid, low = split_factor(ds, x.dtype, SHIFT)
            acc = tl.dot(x_t, high, acc)
            acc_mid = tl.dot(x_t, mid, acc_mid)
            acc_low = tl.dot(x_t, low, acc_low)
        else:
            acc = tl.dot(x_t, ds, acc, input_precision=PRECISION)
    if SPLIT:
        acc = join_sums(acc, acc_mid, acc_low, SHIFT)
    partial_tile_ptr = (
        partial_ptr + tl.program_id(1).to(tl.int64) * stride_ps + first_col.to(tl.int64) * stride_pk
    )
    tl.store(partial_tile_ptr + cols[:, None] * stride_pk + ranks[None, :], acc, mask=col_ok[:, None])
