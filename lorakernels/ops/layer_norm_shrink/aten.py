"""torch's own layer norm, its backward pass, and the shrink as the LoRA linear makes it: one after the other.

The backward pass serves every implementation: it needs mean and rstd alone.
"""

import torch
from torch import Tensor

from lorakernels.ops.layer_norm_shrink.reference import Problem, Results, kept_inputs
from lorakernels.ops.lora_linear.aten import wide_product
from lorakernels.tolerance import accumulation_dtype


def forward(problem: Problem) -> Results:
    """h, S, mean and rstd."""
    x, keep = problem.x, kept_inputs(problem)
    weight, bias = _parameters(x, problem.norm_weight, problem.norm_bias)
    h, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, problem.eps)
    dropped = h if keep is None else h * keep
    s = wide_product(dropped, problem.lora_a.T) * (problem.scale / (1 - problem.dropout_p))
    return h, s, mean, rstd


def backward(
    dh: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """dx [..., K] for dh [..., K], both in x's dtype, mean and rstd [..., 1]."""
    weight, bias = _parameters(x, norm_weight, norm_bias)
    needs = [True, False, False]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dh, x, [x.shape[-1]], mean, rstd, weight, bias, needs
    )
    return dx


def _parameters(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Weight and bias as torch's layer norm takes them.

    On a CPU it has mean and rstd in the parameters' dtype, and mixes 16 bits with float32; CUDA's has them in
    float32 and does not.
    """
    return [one if x.is_cuda else one.to(accumulation_dtype(x.dtype)) for one in parameters]
