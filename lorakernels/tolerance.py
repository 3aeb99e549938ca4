"""How far a result may be from the exact one: one rule, from dtypes and lengths of sums; the dtype of sums.

The tests, the benchmarks and the check before an implementation is first used all use it; nothing is
compared with what another implementation happens to reach.
"""

import math

import torch
from torch import Tensor

# Elements that are widened to float64 at a time: a long result need not fit in float64 as a whole.
BLOCK_ELEMENTS = 2**24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype sums over tensors of a floating dtype are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of got - exact over that of exact, in float64; inf for another shape, inf or nan."""
    if got.shape != exact.shape:
        return math.inf
    got, exact = torch.atleast_1d(got, exact)
    blocks = list(zip(*(tensor.split(_block_rows(exact)) for tensor in (got, exact)), strict=True))
    difference = math.hypot(*(float((one.double() - other.double()).norm()) for one, other in blocks))
    norm = math.hypot(*(float(other.double().norm()) for _, other in blocks))
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else difference


def largest_error(
    exact: Tensor, dtype: torch.dtype, *, operands: torch.dtype, terms: int, roundings: int = 1
) -> float:
    """The largest relative Frobenius error that a right result of dtype can have.

    Args:
        exact: the result in float64.
        operands: dtype of the tensors that were multiplied.
        terms: length of the longest sum.
        roundings: how often a 16-bit result, or what it is a sum of, is rounded to 16 bits on its way.

    A 16-bit result is one rounding away at best: with rho the error of ``exact.to(dtype)`` itself,
    independent roundings add up to sqrt(roundings) · rho, and a tenth more is allowed, with eps /
    sqrt(elements) for chance where few elements hold most of the norm. Everything else in it
    is accumulated in float32. Measured for a LoRA linear whose vendor GEMM is rounded before the update is
    added, in bfloat16: y 0.0024 on an H200, which is 1.45 rho; 1.10 to 1.15 rho on a CPU.

    A float32 result of 16-bit operands has the exact products of these, but tensor cores add with fewer bits
    than IEEE float32 and truncate: 2^-16 + terms · 2^-28. Measured on an H200 at 8,192 and 6,144 terms:
    1.9e-6 to 4.1e-6, the vendor's path 1e-5. It is a hundredth of what rounding an operand to bfloat16 moves
    (1.7e-3), so a dropped low part of a split factor is far above it.

    A float32 result of float32 operands: eps · (4 + sqrt(terms) / 2), the random walk of roundings. Where
    CUDA may use TF32, any float32 result: 2^-9, since a float32 factor then keeps ten bits. A float64
    result: 1e-13, both sides being one computation in another order.

    Raises ValueError where exact overflows dtype: no result could be right.
    """
    if dtype == torch.float64:
        return 1e-13
    if dtype.itemsize == 2:
        rounding = relative_error(exact.to(dtype), exact)
        if not math.isfinite(rounding):
            raise ValueError(f"exact: its values do not fit {dtype}")
        chance = torch.finfo(dtype).eps / math.sqrt(_effective_elements(exact))
        return 1.1 * math.sqrt(roundings) * rounding + chance
    if exact.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2**-9
    if operands.itemsize == 2:
        return 2**-16 + terms * 2**-28
    return torch.finfo(dtype).eps * (4 + math.sqrt(terms) / 2)


def _effective_elements(tensor: Tensor) -> float:
    """How many elements of equal size have the ratio of tensor's 2- and 4-norm; at least 1."""
    norms = [float(torch.linalg.vector_norm(tensor.double(), order)) for order in (2, 4)]
    return max(1.0, (norms[0] / norms[1]) ** 4) if norms[1] else 1.0


def deviations(
    name: str,
    got: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    *,
    operands: torch.dtype,
    terms: int,
    roundings: int = 1,
) -> list[str]:
    """One line for each way in which got is not the exact result in dtype; empty where it is right."""
    lines = []
    if got.dtype != dtype:
        lines.append(f"{name}: {got.dtype} in place of {dtype}")
    error = relative_error(got, exact)
    bound = largest_error(exact, dtype, operands=operands, terms=terms, roundings=roundings)
    if not error <= bound:
        lines.append(f"{name}: relative error {error:.3g} above the bound {bound:.3g}")
    return lines


def structured_deviations(
    name: str,
    got: Tensor,
    exact: Tensor,
    probe: Tensor,
    dtype: torch.dtype,
    *,
    operands: torch.dtype,
    terms: int,
    roundings: int = 1,
) -> list[str]:
    """A line where the error of a 16-bit got [M, N] has a structure, seen through probe [N, r] in float64.

    The low part of a factor, dropped, changes a result no more than one rounding does, and passes
    `deviations` where several are allowed. But roundings of different elements are independent. With e the
    error of exact.to(dtype) itself, those of got put (got - exact)·probe at sqrt(roundings · sum of e_mn² ·
    |probe_n|²), and for few sums up to five standard deviations more; an error along the probe is about
    sqrt(N / r) above that. What float32 accumulation may add is allowed as in `largest_error`. Rows and
    columns of exact must differ, as those of random problems do, or their errors are the same.
    """
    seen_squares = error_squares = independent_squares = 0.0
    weights, gram = probe.square().sum(1), probe.T @ probe
    for one, right in zip(*(tensor.split(_block_rows(exact)) for tensor in (got, exact)), strict=True):
        seen_squares += float((right @ probe).square().sum())
        error_squares += float(((one.double() - right) @ probe).square().sum())
        independent_squares += float(((right.to(dtype).double() - right).square() @ weights).sum())
    # as many as the probe has directions of about its largest: its columns need not differ
    directions = float(gram.trace() / torch.linalg.matrix_norm(gram, 2).clamp(min=1e-300))
    sums = max(1.0, len(exact) * directions)
    independent = math.sqrt(independent_squares) * (1.1 + 5 / math.sqrt(sums)) * math.sqrt(roundings)
    accumulated = largest_error(exact, torch.float32, operands=operands, terms=terms)
    error, bound = math.sqrt(error_squares), independent + accumulated * math.sqrt(seen_squares)
    return [] if error <= bound else [f"{name}: error {error:.3g} above the bound {bound:.3g}"]


def _block_rows(tensor: Tensor) -> int:
    return max(1, BLOCK_ELEMENTS * len(tensor) // max(1, tensor.numel()))
