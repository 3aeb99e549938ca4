"""Kernels for LoRA fine-tuning: fused operations for torch that know nothing of any model."""

from lorakernels.ops.alibi_attention import alibi_attention, alibi_slopes
from lorakernels.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["alibi_attention", "alibi_slopes", "linear_cross_entropy"]
