"""A BLOOM in float64 whose modules round their results once: what a dtype costs a whole model at best.

No implementation in that dtype can be expected to be closer to float64, since each module's result, and its
gradient on the way back, has to be stored.
"""

import math

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomMLP

from lorakernels.tolerance import largest_error, relative_error

# an adapted or fused module may round its parts and their sum
ROUNDINGS = 2
ROUNDED_NAMES = ("query_key_value", "gelu_impl", "attention_dropout")


class _Round(torch.autograd.Function):
    """Values and their gradients go through dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def round_modules(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Make the modules of a float64 BLOOM, with PEFT's adapters or without, round to dtype; in place."""

    def rounded(value):
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        return (
            _Round.apply(value, dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        )

    for name, module in model.named_modules():
        inside_adapter = "lora_" in name or name.endswith(("base_layer", "lm_head"))
        kinds = (nn.LayerNorm, nn.Linear, nn.Embedding, BloomAttention, BloomMLP)
        if not inside_adapter and (isinstance(module, kinds) or name.endswith(ROUNDED_NAMES)):
            module.register_forward_hook(lambda _module, _arguments, result: rounded(result))
        if name.endswith("self_attention.dense"):  # attention's result, which no module returns
            module.register_forward_pre_hook(lambda _module, arguments: rounded(arguments))
    return model


def gradient_bound(exact: Tensor, rounded: Tensor, dtype: torch.dtype, terms: int) -> float:
    """The largest relative error of a gradient of a model in dtype.

    What the rule allows for one operator, times what the model makes of one rounding: the error of rounded,
    which `round_modules` gave, over that of exact's own rounding. terms is the length of the longest sum.
    """
    amplification = relative_error(rounded, exact) / relative_error(exact.to(dtype), exact)
    return amplification * largest_error(exact, dtype, operands=dtype, terms=terms, roundings=ROUNDINGS)


def loss_bound(exact: float, rounded: float, dtype: torch.dtype, tokens: int, terms: int) -> float:
    """The largest relative error of a loss over tokens labels: roundings, and chance in their mean."""
    luck = torch.finfo(dtype).eps / math.sqrt(tokens)
    if dtype == torch.float32:
        luck = torch.finfo(dtype).eps * (4 + math.sqrt(terms) / 2)
    return 1.1 * math.sqrt(ROUNDINGS) * abs(rounded - exact) / abs(exact) + luck
