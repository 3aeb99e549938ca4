"""The LoRA linear on the vendor's GEMM: the frozen product, then a thin addmm into the same memory.

The in-place addmm (beta = 1) spares the separate passes over y and dx that the plain expression pays.
Signatures and shapes are those of reference.py.
"""

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.reference import keep_mask

# Rows of a 16-bit operand that are widened at a time: bounds the float32 copy, long enough for full GEMM
# speed.
WIDEN_ROWS = 1024


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in the adapters' dtype, scale included."""
    dropped = x
    if dropout_p:
        dropped = x * keep_mask(seed, *x.shape, dropout_p, x.device)
    s = _wide_product(dropped, lora_a.T).mul_(scale / (1 - dropout_p))
    y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return _add_product(y, s, lora_b.T), s


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    need_x, need_a, need_b = needs
    keep = keep_mask(seed, *x.shape, dropout_p, x.device) if dropout_p and (need_x or need_a) else None
    dx = da = db = ds = None
    if need_x or need_a:
        ds = _wide_product(dy, lora_b).mul_(scale / (1 - dropout_p))
    if need_x:
        dx = torch.mm(dy, weight)
        if keep is None:
            _add_product(dx, ds, lora_a)
        else:
            dx.add_((ds @ lora_a).mul_(keep))
    if need_a:
        da = _wide_product_over_rows(x if keep is None else x * keep, ds).T
    if need_b:
        db = _wide_product_over_rows(dy, s)
    return dx, da, db


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, r] in b's dtype, without a whole copy of a where b is wider."""
    if a.dtype == b.dtype:
        return a @ b
    out = torch.empty(a.shape[0], b.shape[1], dtype=b.dtype, device=a.device)
    for rows, block in zip(out.split(WIDEN_ROWS), a.split(WIDEN_ROWS), strict=True):
        torch.mm(block.to(b.dtype), b, out=rows)
    return out


def _wide_product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ [K, M] times b [M, r] in b's dtype, without a whole copy of a where b is wider."""
    if a.dtype == b.dtype:
        return a.T @ b
    out = torch.zeros(a.shape[1], b.shape[1], dtype=b.dtype, device=a.device)
    for block, rows in zip(a.split(WIDEN_ROWS), b.split(WIDEN_ROWS), strict=True):
        out.addmm_(block.to(b.dtype).T, rows)
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a [M, r] times b [r, N] to out in place, at no less than out's own precision, and return out."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    # a float32 product out of 16-bit GEMMs: high·high + low·high + high·low as one product of three times the
    # rank
    a_high, b_high = a.to(out.dtype), b.to(out.dtype)
    a_low, b_low = (a - a_high).to(out.dtype), (b - b_high).to(out.dtype)
    return out.addmm_(torch.cat([a_high, a_low, a_high], 1), torch.cat([b_high, b_high, b_low], 0))
