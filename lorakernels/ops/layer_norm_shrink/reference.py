"""A layer norm and the LoRA shrink of its result in plain torch: the definition of correct, in any floating
dtype, float64 included.

Layer norm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) over the K columns of a row of x [M, K], and the
first product of the LoRA linear that follows (`lora_linear.reference`):

    h = (x - mean) · rstd · norm_weight + norm_bias        rstd = 1 / sqrt(variance + eps)
    S = scale · drop(h) · Aᵀ

h is rounded to x's dtype before it is multiplied, since that is the h that the linear layer gets.
"""

from dataclasses import dataclass

from torch import Tensor

from lorakernels.ops.add_layer_norm.reference import layer_norm
from lorakernels.ops.lora_linear.reference import keep_mask, shrink

# h [M, K] in x's dtype; S [M, r], mean [M, 1] and rstd [M, 1] in `accumulation_dtype`
Results = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(slots=True, eq=False)
class Problem:
    """What every implementation, a function from it to `Results`, is given.

    Attributes:
        x: [M, K].
        norm_weight: [K] in x's dtype.
        norm_bias: [K] in x's dtype.
        eps: added to the variance.
        lora_a: [r, K] in x's dtype or `accumulation_dtype`.
        scale: multiplies S.
        dropout_p: probability in [0, 1).
        seed: int64 [1], the dropout mask (see `keep_mask`); [0] where dropout_p is 0.
    """

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    lora_a: Tensor
    scale: float
    dropout_p: float
    seed: Tensor


def forward(problem: Problem) -> Results:
    """h, S, mean and rstd, all computed in `accumulation_dtype`."""
    normed, mean, rstd = layer_norm(problem.x, problem.norm_weight, problem.norm_bias, problem.eps)
    h = normed.to(problem.x.dtype)
    s = shrink(h, problem.lora_a, problem.scale, problem.dropout_p, kept_inputs(problem))
    return h, s, mean, rstd


def kept_inputs(problem: Problem) -> Tensor | None:
    """The mask [M, K] of the elements of h that dropout keeps, None where there is no dropout."""
    rows, columns = problem.x.shape
    return keep_mask(problem.seed, rows, columns, problem.dropout_p) if problem.dropout_p else None
