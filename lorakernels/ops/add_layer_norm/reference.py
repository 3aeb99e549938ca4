"""A residual addition, the layer norm of the sum and the gradient through both in plain torch: the definition
of correct, in any floating dtype, float64 included.

Layer norm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) over the K columns of a row:

    t = x + residual
    h = n · weight + bias        n = (t - mean) · rstd        rstd = 1 / sqrt(variance + eps)

t is rounded to x's dtype before it is normalised. With dt, the gradient of t where t is used beside h, and
g = dh · weight, the gradient of x and of residual alike is

    dx = dt + rstd · (g - mean(g) - n · mean(g · n))

of which both terms are added before the sum is rounded to x's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakernels.tolerance import accumulation_dtype

# t and h [M, K] in x's dtype; mean and rstd [M, 1] in `accumulation_dtype`
Results = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(slots=True, eq=False)
class Problem:
    """What the forward pass of every implementation, a function from it to `Results`, is given.

    Attributes:
        x: [M, K].
        residual: [M, K] in x's dtype.
        weight: [K] in x's dtype.
        bias: [K] in x's dtype.
        eps: added to the variance.
    """

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(slots=True, eq=False)
class BackwardProblem:
    """What the backward pass of every implementation, a function from it to dx [M, K] in x's dtype, is given.

    Attributes:
        dh: [M, K] in x's dtype.
        x: [M, K], of which the layer norm is: t above, or the input of a layer norm without an addition.
        weight: [K] in x's dtype.
        mean: [M, 1] of x, in `accumulation_dtype`.
        rstd: [M, 1] of x, in `accumulation_dtype`.
        dt: [M, K] in x's dtype, to be added; None for nothing.
    """

    dh: Tensor
    x: Tensor
    weight: Tensor
    mean: Tensor
    rstd: Tensor
    dt: Tensor | None


def forward(problem: Problem) -> Results:
    """t, h, mean and rstd, all computed in `accumulation_dtype`."""
    dtype = problem.x.dtype
    t = problem.x + problem.residual
    h, mean, rstd = layer_norm(t, problem.weight, problem.bias, problem.eps)
    return t, h.to(dtype), mean, rstd


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h [M, K], mean [M, 1] and rstd [M, 1] of x [M, K] in `accumulation_dtype`."""
    x = x.to(accumulation_dtype(x.dtype))
    mean = x.mean(1, keepdim=True)
    rstd = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    return torch.addcmul(bias, (x - mean) * rstd, weight), mean, rstd


def backward(problem: BackwardProblem) -> Tensor:
    """dx, computed in `accumulation_dtype`."""
    wide = problem.mean.dtype
    normed = (problem.x.to(wide) - problem.mean) * problem.rstd
    g = problem.dh.to(wide) * problem.weight
    along = (g * normed).mean(1, keepdim=True)
    dx = (g - g.mean(1, keepdim=True) - normed * along) * problem.rstd
    return (dx if problem.dt is None else problem.dt + dx).to(problem.x.dtype)
