"""How right an implementation is, against float64, by the bounds of `lorakernels.tolerance`."""

import torch
from torch import Tensor

from lorakernels.ops.add_layer_norm.check import Normal, norm_failures
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
    normal = Normal(dtype, device, seed)
    return Problem(
        x=normal(m, k, size=1.0, mean=1.0),
        norm_weight=normal(k, size=0.3, mean=1.0),
        norm_bias=normal(k, size=0.3, mean=0.0),
        eps=eps,
        lora_a=normal(r, k, size=k**-0.5, mean=0.0, dtype=adapter_dtype),
        scale=scale,
        dropout_p=0.0,
        seed=torch.empty(0, dtype=torch.int64, device=device),
    )


def failures(results: Results, problem: Problem, multiplier: Tensor | None = None) -> list[str]:
    """One line for each way in which h, S, and mean with rstd are further from float64 than the rule allows.

    S is compared with that of the h at hand, of which it must be a sum. multiplier [M, K] is the dropout mask
    with its factor 1 / (1 - p).
    """
    h, s, mean, rstd = results
    x, k = problem.x, problem.x.shape[1]
    dropped = h.double() if multiplier is None else h.double() * multiplier
    exact_s = problem.scale * dropped @ problem.lora_a.double().T
    wide = accumulation_dtype(x.dtype)
    lines = norm_failures(h, mean, rstd, x, problem.norm_weight, problem.norm_bias, problem.eps, terms=k)
    return lines + deviations("S", s, exact_s, wide, operands=x.dtype, terms=k)
