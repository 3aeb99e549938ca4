"""How right a gradient through GELU is, against float64, by the bounds of `lorakernels.tolerance`."""

import torch
from torch import Tensor

from lorakernels.ops.frozen_linear import reference
from lorakernels.ops.frozen_linear.reference import Problem
from lorakernels.tolerance import deviations

# Rows that are computed in float64 at a time: beside the exact gradient nothing as large exists.
BLOCK_ROWS = 1024


def random_problem(m: int, weight: Tensor, *, seed: int = 0) -> Problem:
    """Standard normal dy and x for weight [N, K]. The global random state is left alone."""
    generator = torch.Generator(weight.device).manual_seed(2**31 + seed)

    def normal(columns: int) -> Tensor:
        shape = (m, columns)
        values = torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32)
        return values.to(weight.dtype)

    n, k = weight.shape
    return Problem(normal(n), weight, normal(k))


def exact_gradient(problem: Problem) -> Tensor:
    """dx [M, K] in float64."""
    exact = torch.empty(problem.x.shape, dtype=torch.float64, device=problem.x.device)
    weight = problem.weight.double()
    for part, dy, x in zip(*(one.split(BLOCK_ROWS) for one in (exact, problem.dy, problem.x)), strict=True):
        part.copy_(reference.backward(dy.double(), weight, x.double()))
    return exact


def failures(dx: Tensor, problem: Problem, *, roundings: int = 1, exact: Tensor | None = None) -> list[str]:
    """One line for each way in which dx is further from float64 than the rule allows.

    exact: what `exact_gradient` returns, where it is known.
    """
    dtype, terms = problem.x.dtype, len(problem.weight)
    exact = exact_gradient(problem) if exact is None else exact
    return deviations("dx", dx, exact, dtype, operands=dtype, terms=terms, roundings=roundings)
