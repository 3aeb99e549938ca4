"""A residual addition with its layer norm, and the gradient through both, in one Triton kernel each.

A program has one row, whole, in registers: everything is read once and written once. The variance is that of
the centred row, so that no large squares are subtracted from each other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.launching import launch
from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem, Results

# Elements of a row for each warp: one load of 16 bytes a thread in 16 bits.
WARP_COLUMNS, MOST_WARPS = 256, 16


@triton.jit
def add_layer_norm_forward_kernel(
    # data: x and residual [M, K], weight and bias [K]; t and h [M, K], mean and rstd [M]
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    t_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    # sizes
    K,
    # strides
    stride_xm,
    stride_residual_m,
    stride_tm,
    stride_hm,
    eps,
    # constants
    BLOCK_K: tl.constexpr,
):
    """t = x + residual; h = layer norm of t."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    ok = columns < K
    x = tl.load(x_ptr + row * stride_xm + columns, mask=ok, other=0.0).to(tl.float32)  # [BLOCK_K]
    residual = tl.load(residual_ptr + row * stride_residual_m + columns, mask=ok, other=0.0).to(tl.float32)
    rounded = (x + residual).to(t_ptr.dtype.element_ty)
    tl.store(t_ptr + row * stride_tm + columns, rounded, mask=ok)
    t = rounded.to(tl.float32)
    mean = tl.sum(t, 0) / K
    centred = tl.where(ok, t - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=ok, other=0.0).to(tl.float32)
    h = centred * rstd * weight + bias
    tl.store(h_ptr + row * stride_hm + columns, h.to(h_ptr.dtype.element_ty), mask=ok)


@triton.jit
def add_layer_norm_backward_kernel(
    # data: dh, x and dt [M, K], weight [K], mean and rstd [M]; dx [M, K]
    dh_ptr,
    x_ptr,
    dt_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    # sizes
    K,
    # strides
    stride_dhm,
    stride_xm,
    stride_dtm,
    stride_dxm,
    # constants
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
):
    """dx = dt + the gradient of x through its layer norm."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    ok = columns < K
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    dh = tl.load(dh_ptr + row * stride_dhm + columns, mask=ok, other=0.0).to(tl.float32)  # [BLOCK_K]
    x = tl.load(x_ptr + row * stride_xm + columns, mask=ok, other=0.0).to(tl.float32)
    g = dh * tl.load(weight_ptr + columns, mask=ok, other=0.0).to(tl.float32)
    normed = (x - mean) * rstd
    # g is zero past the row's end
    along = tl.sum(g * normed, 0) / K
    dx = (g - tl.sum(g, 0) / K - normed * along) * rstd
    if ADD:
        dx += tl.load(dt_ptr + row * stride_dtm + columns, mask=ok, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * stride_dxm + columns, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def forward(problem: Problem) -> Results:
    """t, h, mean and rstd; M and K are not zero."""
    x, residual = with_whole_rows(problem.x), with_whole_rows(problem.residual)
    m, k = x.shape
    t, h = (torch.empty(m, k, dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(m, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        launch(
            add_layer_norm_forward_kernel, (m,),
            x, residual, problem.weight.contiguous(), problem.bias.contiguous(), t, h, mean, rstd,
            k, x.stride(0), residual.stride(0), t.stride(0), h.stride(0), problem.eps, **_row(k),
        )  # fmt: skip
    return t, h, mean, rstd


def backward(problem: BackwardProblem) -> Tensor:
    """dx; M and K are not zero."""
    dh, x = with_whole_rows(problem.dh), with_whole_rows(problem.x)
    # unread where there is nothing to add
    dt = dh if problem.dt is None else with_whole_rows(problem.dt)
    m, k = x.shape
    dx = torch.empty(m, k, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(
            add_layer_norm_backward_kernel, (m,),
            dh, x, dt, problem.weight.contiguous(), problem.mean, problem.rstd, dx,
            k, dh.stride(0), x.stride(0), dt.stride(0), dx.stride(0), ADD=problem.dt is not None, **_row(k),
        )  # fmt: skip
    return dx


def with_whole_rows(rows: Tensor) -> Tensor:
    """rows [M, K], copied where the elements of a row do not lie side by side."""
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _row(k: int) -> dict[str, int]:
    """The block that holds a row of k elements, and the warps that share it."""
    block = triton.next_power_of_2(k)
    return {"BLOCK_K": block, "num_warps": min(MOST_WARPS, max(1, block // WARP_COLUMNS))}
