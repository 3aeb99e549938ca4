"""Kernels for LoRA fine-tuning: fused operations for torch that know nothing of any model."""

from lorakernels.dispatch import kernel_choices, kernel_report, use_kernel_choices
from lorakernels.modules import LoRALinear, RowParts
from lorakernels.ops.add_layer_norm import add_layer_norm
from lorakernels.ops.alibi_attention import (
    AttentionMask,
    alibi_attention,
    alibi_slopes,
    attention_mask,
    choose_attention_kernels,
)
from lorakernels.ops.frozen_linear import frozen_linear
from lorakernels.ops.layer_norm_shrink import layer_norm_shrink
from lorakernels.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_in_blocks
from lorakernels.ops.lora_linear import lora_linear

__all__ = [
    "AttentionMask",
    "LoRALinear",
    "RowParts",
    "add_layer_norm",
    "alibi_attention",
    "alibi_slopes",
    "attention_mask",
    "choose_attention_kernels",
    "frozen_linear",
    "kernel_choices",
    "kernel_report",
    "layer_norm_shrink",
    "linear_cross_entropy",
    "linear_cross_entropy_in_blocks",
    "lora_linear",
    "use_kernel_choices",
]
