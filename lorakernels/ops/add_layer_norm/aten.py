"""torch's own addition and layer norm, and its backward pass, one after the other.

dx is rounded once more than need be: before it is added to dt.
"""

import torch
from torch import Tensor

from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem, Results
from lorakernels.tolerance import accumulation_dtype


def forward(problem: Problem) -> Results:
    """t, h, mean and rstd."""
    t = problem.x + problem.residual
    return t, *layer_norm(t, problem.weight, problem.bias, problem.eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """h [M, K] in x's dtype, mean and rstd [M, 1] in `accumulation_dtype` of x [M, K]."""
    return torch.native_layer_norm(x, [x.shape[1]], _parameter(weight), _parameter(bias), eps)


def backward(problem: BackwardProblem) -> Tensor:
    """dx."""
    x, dt = problem.x, problem.dt
    needs = [True, False, False]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        problem.dh, x, [x.shape[1]], problem.mean, problem.rstd, _parameter(problem.weight), None, needs
    )
    return dx if dt is None else dx.add_(dt)


def _parameter(one: Tensor) -> Tensor:
    """Weight or bias as torch's layer norm takes them.

    On a CPU it has mean and rstd in the parameters' dtype, and mixes 16 bits with float32; CUDA's has them in
    float32 and does not.
    """
    return one if one.is_cuda else one.to(accumulation_dtype(one.dtype))
