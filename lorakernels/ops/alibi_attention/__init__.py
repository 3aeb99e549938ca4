"""Causal attention with ALiBi and document boundaries."""

import torch

from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.ops.alibi_attention.slopes import alibi_slopes

__all__ = ["alibi_attention", "alibi_slopes"]


def alibi_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal ALiBi attention; query, key, value [B, heads, T, D], slopes [heads], document_ids [B, T]."""
    return alibi_attention_reference(query, key, value, slopes, document_ids)
