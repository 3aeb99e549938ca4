"""How right an implementation is, against float64, by the bounds of `lorakernels.tolerance`."""

import torch
from torch import Tensor

from lorakernels.ops.layer_norm_shrink import reference
from lorakernels.ops.layer_norm_shrink.reference import Problem, Results
from lorakernels.tolerance import accumulation_dtype, deviations


def random_problem(
    m: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    device: torch.device | str,
    *,
    eps: float = 1e-5,
    scale: float = 1.5,
    seed: int = 0,
) -> Problem:
    """A problem without dropout: x has mean 1 and variance 1, the norm's parameters scale and shift it.

    The global random state is left alone.
    """
    generator = torch.Generator(device).manual_seed(2**31 + seed)

    def normal(*shape: int, size: float, mean: float, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return (values * size + mean).to(to)

    return Problem(
        x=normal(m, k, size=1.0, mean=1.0),
        norm_weight=normal(k, size=0.3, mean=1.0),
        norm_bias=normal(k, size=0.3, mean=0.0),
        eps=eps,
        lora_a=normal(r, k, size=k**-0.5, mean=0.0, to=adapter_dtype),
        scale=scale,
        dropout_p=0.0,
        seed=torch.empty(0, dtype=torch.int64, device=device),
    )


def exact_results(problem: Problem) -> Results:
    """h, S, mean and rstd in float64, S of the unrounded h."""
    tensors = (problem.x, problem.norm_weight, problem.norm_bias, problem.lora_a)
    x, norm_weight, norm_bias, lora_a = (one.detach().double() for one in tensors)
    wide = Problem(
        x, norm_weight, norm_bias, problem.eps, lora_a, problem.scale, problem.dropout_p, problem.seed
    )
    return reference.forward(wide)


def failures(results: Results, problem: Problem, multiplier: Tensor | None = None) -> list[str]:
    """One line for each way in which h, S, and mean with rstd are further from float64 than the rule allows.

    S is compared with that of the h at hand, of which it must be a sum. mean and rstd are what
    the backward pass makes (x - mean) · rstd of, and are judged by it. multiplier [M, K] is the dropout mask
    with its factor 1 / (1 - p).
    """
    h, s, mean, rstd = results
    dtype, k = problem.x.dtype, problem.x.shape[1]
    wide, x = accumulation_dtype(dtype), problem.x.double()
    exact_h, _, exact_mean, exact_rstd = exact_results(problem)
    dropped = h.double() if multiplier is None else h.double() * multiplier
    exact_s = problem.scale * dropped @ problem.lora_a.double().T
    normed, exact_normed = (x - mean.double()) * rstd.double(), (x - exact_mean) * exact_rstd
    lines = deviations("h", h, exact_h, dtype, operands=dtype, terms=k)
    lines += deviations("S", s, exact_s, wide, operands=dtype, terms=k)
    lines += deviations("mean, rstd", normed.to(wide), exact_normed, wide, operands=dtype, terms=k)
    lines += [
        f"{name}: {one.dtype} in place of {wide}"
        for name, one in (("mean", mean), ("rstd", rstd))
        if one.dtype != wide
    ]
    return lines
