"""The LoRA linear in Triton: thin passes around one GEMM that adds the low-rank update to the frozen product.

Forward    A and B in parts (`parts`); S = s·drop(x)·Aᵀ (`thin`); then y = [x | S]·[W | B]ᵀ + bias in one
           GEMM, whose K loop runs over (x, W) and continues over (S, B).
Backward   A, B and S in parts; dS = s·dy·B and dB = dyᵀ·S; dx = [dy | dS]·[W; A] by the same GEMM;
           dA = dSᵀ·drop(x).

`tiles` says which GEMM serves which chip and tensors: `tma_gemm`, `pointer_gemm`, or the vendor's. Sums that
several programs share are written as partial sums and added by a second kernel in a fixed order: no atomics,
the same bits every time. Accumulation is in float32, as is S. What is rounded to 16 bits is the result alone,
once, but with the vendor's GEMM, whose result is rounded before the update is added.

Dropout is a function of (seed, row, column), `reference.keep_mask`, so that every kernel makes the mask that
the forward used again.
"""

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.problem import Gradients, Needs, Problem
from lorakernels.ops.lora_linear.triton import parts, pointer_gemm, thin, tma_gemm, vendor_gemm
from lorakernels.ops.lora_linear.triton.parts import Layout, Parts
from lorakernels.ops.lora_linear.triton.tiles import Family, Gemm, default_gemm

# One pass over dy for dS and dB beats two up to so many ranks: measured on an H200, 51 against 68 us at 8 and
# 138 against 84 us at 64, where the sums of both overflow the registers.
ONE_PASS_RANKS = 16


def forward(problem: Problem, *, gemm: Gemm | None = None) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in float32, scale included; M, N and K are not zero."""
    x, weight, seed = _unit_columns(problem.x), problem.weight, problem.seed
    layout = Layout.of(x, problem.lora_a)
    with torch.cuda.device_of(x):
        if problem.s is None:
            a, b, _ = parts.pack(layout, weight, problem.lora_a, problem.lora_b, None)
            factor = problem.scale / (1 - problem.dropout_p)
            s, left = thin.shrink(layout, x, a, factor, problem.dropout_p, seed, wide=True)
        else:
            s = _unit_columns(problem.s)
            _, b, left = parts.pack(layout, weight, None, problem.lora_b, s, whole_s=True)
        return _product(x, weight, problem.bias, left, b, 0.0, seed, gemm), s


def backward(problem: Problem, dy: Tensor, s: Tensor, needs: Needs, *, gemm: Gemm | None = None) -> Gradients:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    weight, lora_a, lora_b = problem.weight, problem.lora_a, problem.lora_b
    dropout_p, seed = problem.dropout_p, problem.seed
    need_x, need_a, need_b = needs
    need_ds = need_x or need_a
    dx = da = db = None
    dy, x, s = _unit_columns(dy), _unit_columns(problem.x), _unit_columns(s)
    layout, factor = Layout.of(x, lora_a), problem.scale / (1 - dropout_p)
    with torch.cuda.device_of(x):
        a, b, s_parts = parts.pack(
            layout, weight, lora_a if need_x else None, lora_b if need_ds else None, s if need_b else None
        )
        if need_ds and need_b and layout.width <= ONE_PASS_RANKS:
            partial_ds, partial_db = thin.both_thin_gradients(layout, dy, b, s_parts)
            left = parts.reduce_to_parts(layout, partial_ds, factor)
            db = parts.reduce(layout, partial_db, lora_b.dtype)
        else:
            if need_ds:
                _, left = thin.shrink(layout, dy, b, factor, 0.0, seed, wide=False)
            if need_b:
                db = parts.reduce(layout, thin.sum_over_rows(layout, dy, s_parts, 0.0, seed), lora_b.dtype)
        if need_x:
            dx = _product(dy, weight.T, None, left, a, dropout_p, seed, gemm)
        if need_a:
            partial_da = thin.sum_over_rows(layout, x, left, dropout_p, seed)
            da = parts.reduce(layout, partial_da, lora_a.dtype, by_columns=True).T
    return dx, da, db


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Parts,
    right: Parts,
    dropout_p: float,
    seed: Tensor,
    gemm: Gemm | None,
) -> Tensor:
    """x·weightᵀ + bias + drop'(left·rightᵀ), [M, N], by gemm, or by the default where gemm cannot address it.

    ValueError for the vendor's GEMM under dropout, which it cannot mask.
    """
    gemm = gemm or default_gemm(x.dtype)
    if gemm.family is Family.VENDOR:
        if dropout_p:
            raise ValueError("gemm: the vendor's cannot mask the update of dx, got a problem with dropout")
        return vendor_gemm.product(x, weight, bias, left, right)
    if gemm.family is Family.TMA and tma_gemm.addressable(x, weight):
        return tma_gemm.product(
            x, weight, gemm.tile, bias=bias, update=(left, right), dropout_p=dropout_p, seed=seed
        )
    if gemm.family is not Family.POINTER:
        gemm = default_gemm(x.dtype)
    return pointer_gemm.product(x, weight, bias, left, right, dropout_p, seed, gemm.tile)


def _unit_columns(tensor: Tensor) -> Tensor:
    """tensor [M, K] itself where its columns are adjacent, else a contiguous copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
