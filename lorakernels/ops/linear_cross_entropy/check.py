"""How right an implementation of `linear_cross_entropy` is, against float64."""

import math

import torch
from torch import Tensor

from lorakernels.tolerance import accumulation_dtype, largest_error, relative_error

RESULTS = ("loss", "dhidden", "dweight")


def bounds(
    exact: list[Tensor],
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    vocabulary: int,
    largest_logit: float,
    rounds_products: bool = False,
) -> list[float]:
    """The largest relative errors of loss, dhidden and, if made, dweight.

    Args:
        exact: the loss, reduced or not, and the gradients of hidden and weight in float64.
        dtype: that of hidden and weight.
        rows, width, vocabulary: T, H and V; the sums have V terms (dweight: T), those of the logits H.
        largest_logit: the largest absolute value among the logits.
        rounds_products: whether logits, their gradients and products with these are made in 16 bits.

    Beside what `tolerance.largest_error` allows for the sums themselves, all results move with the logits. If
    each of these is off by at most d, the odds of any column against any other change by a factor of at most
    exp(2 d), and with them, at most, every loss, every probability and 1 - the label's probability, since
    softplus and the logistic function grow no faster than the exponential one. d is the largest logit times
    its relative error: that of a sum of H terms, or half an eps where logits are rounded to 16 bits. In that
    case the gradient of the logits, the products with it and the result are rounded too: three roundings.
    """
    wide = accumulation_dtype(dtype)
    of_a_logit = torch.finfo(dtype).eps / 2
    if not rounds_products:
        of_a_logit = largest_error(exact[0], wide, operands=dtype, terms=width)
    through_logits = math.expm1(2 * of_a_logit * largest_logit)
    roundings = 3 if rounds_products else 1
    found = []
    for name, right in zip(RESULTS, exact, strict=False):
        expected = wide if name == "loss" else dtype
        terms = rows if name == "dweight" else vocabulary
        allowed = largest_error(right, expected, operands=dtype, terms=terms, roundings=roundings)
        found.append(allowed + through_logits)
    return found


def failures(results: list[Tensor], exact: list[Tensor], dtype: torch.dtype, **sizes) -> list[str]:
    """One line for each of loss, dhidden and dweight that is further from float64 than `bounds` allows."""
    lines = []
    allowed = bounds(exact, dtype, **sizes)
    for name, got, right, bound in zip(RESULTS[: len(exact)], results, exact, allowed, strict=True):
        expected = accumulation_dtype(dtype) if name == "loss" else dtype
        error = relative_error(got, right)
        if got.dtype != expected:
            lines.append(f"{name}: {got.dtype} in place of {expected}")
        if not error <= bound:
            lines.append(f"{name}: relative error {error:.3g} above the bound {bound:.3g}")
    return lines
