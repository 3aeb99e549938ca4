"""The gradient of the layer after GELU in one kernel: that of the LoRA linear's GEMM without an update.

The product is multiplied by GELU's derivative before it is rounded and stored, so that it is neither written
to memory nor read again.
"""

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.triton import tma_gemm
from lorakernels.ops.lora_linear.triton.tiles import Tile


def backward(dy: Tensor, weight: Tensor, x: Tensor, *, tile: Tile) -> Tensor:
    """dx [M, K] for dy [M, N] and x [M, K]; of what `implementations.fused` offers it for."""
    with torch.cuda.device_of(x):
        return tma_gemm.product(_describable(dy), weight.T, tile, gelu_input=_describable(x))


def _describable(tensor: Tensor) -> Tensor:
    """tensor [rows, columns] itself where a descriptor of it is possible and no rows overlap, else a copy."""
    if tma_gemm.describable(tensor) and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
