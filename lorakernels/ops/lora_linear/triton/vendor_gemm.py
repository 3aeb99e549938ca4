"""The vendor's GEMM with the frozen weight; the update is added to its rounded result in place."""

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.triton.parts import Parts


def product(x: Tensor, weight: Tensor, bias: Tensor | None, left: Parts, right: Parts) -> Tensor:
    """x·weightᵀ + bias + left·rightᵀ, [M, N]; in 16 bits rounded twice."""
    y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return y.addmm_(left.values[:, : left.columns], right.values[:, : right.columns].T)
