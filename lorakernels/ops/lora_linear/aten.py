"""The LoRA linear on the vendor's GEMM, without the separate passes over y and dx that the plain expression
pays.

In float32 and float64 the thin product comes first, bias and all, and the frozen GEMM adds to it in place
(beta = 1): the write that would have spread the bias over y carries the update too. In 16 bits the thin
product is added to the frozen one, which there has a bias epilogue. forward_wide and backward_wide run the
frozen product of 16-bit tensors in float32, on blocks of the weight, for a CPU whose 16-bit products are the
slower ones. Shapes are those of `Problem`; S and dS are in float32 or wider.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakernels.cpu_gemm import weight_blocks
from lorakernels.ops.lora_linear.problem import Gradients, Needs, Problem
from lorakernels.ops.lora_linear.reference import kept_inputs
from lorakernels.tolerance import accumulation_dtype

# Rows of a 16-bit operand that are widened at a time: bounds the float32 copy, long enough for full GEMM
# speed.
WIDEN_ROWS = 1024
# MKL takes twice as long for a product of 8 columns as for one of 16.
CPU_COLUMNS = 16
# A sum over rows is made with its few output rows on the left (a third of the time of the other order with
# MKL) and as a batch of this many groups of columns, which two threads share better than one product.
CPU_GROUPS = 16

Product = Callable[[Tensor, Tensor], Tensor]


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in accumulation_dtype, scale included."""
    x, weight, bias, lora_b = problem.x, problem.weight, problem.bias, problem.lora_b
    s = shrink(problem)
    if x.dtype == s.dtype:
        return _thin_with_bias(s, lora_b, bias).addmm_(x, weight.T), s
    y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return _add_product(y, s, lora_b.T), s


def backward(problem: Problem, dy: Tensor, s: Tensor, needs: Needs) -> Gradients:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    weight, lora_a = problem.weight, problem.lora_a
    ds, keep, da, db = thin_gradients(problem, dy, s, needs)
    if ds is None or not needs[0]:
        return None, da, db
    if dy.dtype == ds.dtype:
        dx = ds @ lora_a
        dx = (dx if keep is None else dx.mul_(keep)).addmm_(dy, weight)
    else:
        dx = torch.mm(dy, weight)
        if keep is None:
            _add_product(dx, ds, lora_a)
        else:
            dx.add_((ds @ lora_a.to(ds.dtype)).mul_(keep))
    return dx, da, db


def forward_wide(problem: Problem) -> tuple[Tensor, Tensor]:
    """As forward, the products in float32: y is rounded once."""
    x, weight, bias, lora_b = problem.x, problem.weight, problem.bias, problem.lora_b
    s = shrink(problem)
    wide_x, wide_b = x.to(s.dtype), lora_b.to(s.dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    wide_bias = None if bias is None else bias.to(s.dtype)
    for start, stop, block in weight_blocks(weight, WIDEN_ROWS, s.dtype):
        rows = slice(start, stop)
        thin = _thin_with_bias(s, wide_b[rows], None if wide_bias is None else wide_bias[rows])
        y[:, rows] = thin.addmm_(wide_x, block.T)
    return y, s


def backward_wide(problem: Problem, dy: Tensor, s: Tensor, needs: Needs) -> Gradients:
    """As backward, the products in float32: dx is rounded once."""
    ds, keep, da, db = thin_gradients(problem, dy, s, needs)
    if ds is None or not needs[0]:
        return None, da, db
    total = ds @ problem.lora_a.to(ds.dtype)
    if keep is not None:
        total.mul_(keep)
    for start, stop, block in weight_blocks(problem.weight, WIDEN_ROWS, ds.dtype):
        total.addmm_(dy[:, start:stop].to(ds.dtype), block)
    return total.to(problem.x.dtype), da, db


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, r] in a's wide dtype, without a whole wide copy of a."""
    wide, rank = accumulation_dtype(a.dtype), b.shape[1]
    if a.is_cuda:
        return a @ b if a.dtype == wide else _product_of_parts(a, b)
    b = b.to(wide)
    if rank % CPU_COLUMNS:
        b = torch.nn.functional.pad(b, (0, -rank % CPU_COLUMNS))
    if a.dtype == wide:
        return (a @ b)[:, :rank]
    out = torch.empty(a.shape[0], b.shape[1], dtype=wide, device=a.device)
    for rows, block in zip(out.split(WIDEN_ROWS), a.split(WIDEN_ROWS), strict=True):
        torch.mm(block.to(wide), b, out=rows)
    return out[:, :rank]


def wide_product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ [K, M] times b [M, r] in a's wide dtype, without a whole wide copy of a."""
    wide = accumulation_dtype(a.dtype)
    if a.is_cuda:
        return a.T @ b if a.dtype == wide else _product_of_parts(a.T, b)
    if a.dtype == wide and a.shape[1] % (CPU_GROUPS * CPU_COLUMNS):
        return (b.T @ a).T
    if a.dtype == wide:
        groups = a.unflatten(1, (CPU_GROUPS, -1)).transpose(0, 1)
        return torch.bmm(b.T.expand(CPU_GROUPS, -1, -1), groups).transpose(0, 1).flatten(1).T
    blocks = zip(a.split(WIDEN_ROWS), b.split(WIDEN_ROWS), strict=True)
    products = (wide_product_over_rows(block.to(wide), rows) for block, rows in blocks)
    return sum(products, start=b.new_zeros(()))


def shrink(problem: Problem, product: Product = wide_product) -> Tensor:
    """S = scale·drop(x)·Aᵀ, [M, r]; the problem's own where it is known."""
    if problem.s is not None:
        return problem.s
    x, keep = problem.x, kept_inputs(problem)
    dropped = x if keep is None else x * keep
    return product(dropped, problem.lora_a.T) * (problem.scale / (1 - problem.dropout_p))


def thin_gradients(
    problem: Problem,
    dy: Tensor,
    s: Tensor,
    needs: Needs,
    product: Product = wide_product,
    product_over_rows: Product = wide_product_over_rows,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dS [M, r], the keep mask [M, K], dA and dB, each None where it is not needed."""
    x, lora_a, lora_b = problem.x, problem.lora_a, problem.lora_b
    need_x, need_a, need_b = needs
    ds = keep = da = db = None
    if need_x or need_a:
        ds = product(dy, lora_b) * (problem.scale / (1 - problem.dropout_p))
        keep = kept_inputs(problem)
        if need_a:
            da = product_over_rows(x if keep is None else x * keep, ds).T.to(lora_a.dtype)
    if need_b:
        db = product_over_rows(dy, s).to(lora_b.dtype)
    return ds, keep, da, db


def _thin_with_bias(s: Tensor, lora_b: Tensor, bias: Tensor | None) -> Tensor:
    """S·Bᵀ + bias, [M, N]."""
    return s @ lora_b.T if bias is None else torch.addmm(bias, s, lora_b.T)


def _product_of_parts(a: Tensor, b: Tensor) -> Tensor:
    """a in 16 bits times b [K, r] by one 16-bit GEMM into float32, with b as high + low / shift."""
    if a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    # float16 has no exponents to spare for the residues of small factors
    shift = 2048.0 if a.dtype == torch.float16 else 1.0
    parts = b.new_empty(len(b), 2, b.shape[1], dtype=a.dtype)
    parts[:, 0] = b
    _residue(b, parts[:, 0], shift, out=parts[:, 1])
    high, low = torch.mm(a, parts.flatten(1), out_dtype=torch.float32).chunk(2, 1)
    return torch.add(high, low, alpha=1 / shift)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a [M, r] times b [r, N] to out in place, at no less than out's own precision, and return out."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    # one 16-bit product of a longer rank: (high + low)·high and, where b is wide, + high·low
    count, rank = (2 if b.dtype == out.dtype else 3), len(b)
    left = a.new_empty(len(a), count, rank, dtype=out.dtype)
    right = b.new_empty(count, *b.shape, dtype=out.dtype)
    left[:, ::2] = a[:, None]
    _residue(a, left[:, 0], out=left[:, 1])
    right[:2] = b
    if count == 3:
        _residue(b, right[0], out=right[2])
    return out.addmm_(left.flatten(1), right.flatten(0, 1))


def _residue(factor: Tensor, high: Tensor, shift: float = 1.0, *, out: Tensor) -> None:
    """shift · (factor - high), rounded to out's dtype."""
    torch.sub(factor if shift == 1.0 else factor * shift, high, alpha=shift, out=out)
