"""How right an implementation is, against float64, by the bounds of `lorakernels.tolerance`."""

import torch
from torch import Tensor

from lorakernels.ops.add_layer_norm import reference
from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem, Results
from lorakernels.tolerance import accumulation_dtype, deviations


def random_problem(
    m: int, k: int, dtype: torch.dtype, device: torch.device | str, *, eps: float = 1e-5, seed: int = 0
) -> Problem:
    """x + residual has mean 1 and variance 1, the norm's parameters scale and shift it.

    The global random state is left alone.
    """
    normal = Normal(dtype, device, seed)
    return Problem(
        x=normal(m, k, size=0.8, mean=0.5),
        residual=normal(m, k, size=0.6, mean=0.5),
        weight=normal(k, size=0.3, mean=1.0),
        bias=normal(k, size=0.3, mean=0.0),
        eps=eps,
    )


def random_backward_problem(
    m: int, k: int, dtype: torch.dtype, device: torch.device | str, *, adds: bool = True, seed: int = 0
) -> BackwardProblem:
    """x has mean 1 and variance 1; both terms of dx are of one size, or dt is None without adds.

    The global random state is left alone.
    """
    normal = Normal(dtype, device, seed)
    x = normal(m, k, size=1.0, mean=1.0)
    _, mean, rstd = reference.layer_norm(x.double(), x.new_ones(k), x.new_zeros(k), 1e-5)
    return BackwardProblem(
        dh=normal(m, k, size=1.0, mean=0.3),
        x=x,
        weight=normal(k, size=0.3, mean=1.0),
        mean=mean.to(accumulation_dtype(dtype)),
        rstd=rstd.to(accumulation_dtype(dtype)),
        dt=normal(m, k, size=1.0, mean=0.0) if adds else None,
    )


class Normal:
    """Normally distributed tensors, of dtype where none is asked for, each drawn after the one before."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(2**31 + seed)
        self.dtype = dtype

    def __call__(self, *shape: int, size: float, mean: float, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(
            *shape, generator=self.generator, device=self.generator.device, dtype=torch.float32
        )
        return (drawn * size + mean).to(dtype or self.dtype)


def failures(results: Results, problem: Problem) -> list[str]:
    """One line for each way in which t, h, and mean with rstd are further from float64 than the rule allows.

    The layer norm is compared with that of the t at hand.
    """
    t, h, mean, rstd = results
    dtype, k = problem.x.dtype, problem.x.shape[1]
    exact_t = problem.x.double() + problem.residual.double()
    lines = deviations("t", t, exact_t, dtype, operands=dtype, terms=2)
    return lines + norm_failures(h, mean, rstd, t, problem.weight, problem.bias, problem.eps, terms=k)


def norm_failures(
    h: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, terms: int
) -> list[str]:
    """As `failures`, for h, mean and rstd of a layer norm of x [M, K].

    mean and rstd are what the backward pass makes (x - mean) · rstd of, and are judged by it.
    """
    dtype, wide = x.dtype, accumulation_dtype(x.dtype)
    x = x.double()
    exact_h, exact_mean, exact_rstd = reference.layer_norm(x, weight.double(), bias.double(), eps)
    normed, exact_normed = (x - mean.double()) * rstd.double(), (x - exact_mean) * exact_rstd
    lines = deviations("h", h, exact_h, dtype, operands=dtype, terms=terms)
    lines += deviations("mean, rstd", normed.to(wide), exact_normed, wide, operands=dtype, terms=terms)
    lines += [
        f"{name}: {one.dtype} in place of {wide}"
        for name, one in (("mean", mean), ("rstd", rstd))
        if one.dtype != wide
    ]
    return lines


def backward_failures(dx: Tensor, problem: BackwardProblem, roundings: int = 1) -> list[str]:
    """One line where dx is further from float64 than the rule allows; roundings as in `tolerance`."""
    dtype, k = problem.x.dtype, problem.x.shape[1]
    given = (problem.dh, problem.x, problem.weight, problem.mean, problem.rstd)
    dh, x, weight, mean, rstd = (one.double() for one in given)
    dt = None if problem.dt is None else problem.dt.double()
    exact = reference.backward(BackwardProblem(dh, x, weight, mean, rstd, dt))
    return deviations("dx", dx, exact, dtype, operands=dtype, terms=k, roundings=roundings)
