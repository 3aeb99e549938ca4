"""The gradient of a frozen linear layer after GELU in plain torch: the definition of correct, in any floating
dtype, float64 included.

For y = gelu(x)·Wᵀ + b and the gradient dy of y:

    dx = (dy·W) · gelu'(x)        gelu'(x) = (1 + t)/2 + x/2 · (1 - t²) · sqrt(2/π)·(1 + 3·0.044715·x²)
                                  t = tanh(sqrt(2/π)·(x + 0.044715·x³))

gelu is the tanh form of Hendrycks and Gimpel (2016, https://arxiv.org/abs/1606.08415).
"""

import math
from typing import NamedTuple

from torch import Tensor

from lorakernels.tolerance import accumulation_dtype

# of the tanh form
SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


class Problem(NamedTuple):
    """What every implementation is given.

    Attributes:
        dy: [M, N].
        weight: [N, K] in dy's dtype, in either storage order.
        x: [M, K] in dy's dtype, what GELU was applied to.
    """

    dy: Tensor
    weight: Tensor
    x: Tensor


def backward(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """dx [M, K] in x's dtype, computed in `accumulation_dtype`."""
    wide = accumulation_dtype(x.dtype)
    return ((dy.to(wide) @ weight.to(wide)) * gelu_derivative(x.to(wide))).to(x.dtype)


def gelu_derivative(x: Tensor) -> Tensor:
    """gelu'(x), of x's shape and dtype."""
    square = x * x
    tanh = (SLOPE * (x + CUBIC * x * square)).tanh()
    return (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * SLOPE * (1 + 3 * CUBIC * square)
