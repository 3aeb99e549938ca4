"""How far a result may be from the exact one: a rule that follows from the dtype."""

import math

import torch
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of got - exact over that of exact, in float64; inf for a wrong shape or a non-number."""
    if got.shape != exact.shape or not torch.isfinite(got).all():
        return math.inf
    difference, norm = (got.double() - exact.double()).norm(), exact.double().norm()
    return float(difference / norm) if norm else float(difference)


def error_bound(plain_error: float, dtype: torch.dtype, elements: int) -> float:
    """The largest error that passes for a result of dtype, given that of the plain expression."""
    eps = torch.finfo(dtype).eps
    return 1.2 * plain_error + (eps / math.sqrt(max(elements, 1)) if dtype.itemsize == 2 else 4 * eps)
