"""The definition of `alibi_attention` in plain torch; O(T²) memory, runs in any floating dtype."""

import torch

from lorakernels.ops.alibi_attention.slopes import alibi_bias, document_starts, key_positions


def alibi_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None = None,
    *,
    bias_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Softmax attention as written in Press et al. 2021 (arXiv:2108.12409), [B, heads, T, D].

    bias_dtype is the dtype that the bias is rounded to, query's own if None: an oracle in float64 for a bf16
    model passes float64 tensors and ``bias_dtype=torch.bfloat16``.
    """
    batch, _, length, head_dim = query.shape
    if document_ids is None:
        document_ids = torch.zeros(batch, length, dtype=torch.int64, device=query.device)
    bias = alibi_bias(slopes, key_positions(document_ids), bias_dtype or query.dtype).to(
        query.dtype
    )  # [B, h, T]
    starts = document_starts(document_ids)
    allowed = starts[:, :, None] == starts[:, None, :]  # [B, T, T]
    allowed = allowed.tril()[:, None]
    scores = query @ key.transpose(-1, -2) * head_dim**-0.5 + bias[:, :, None, :]
    scores = scores.masked_fill(~allowed, -torch.inf)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=statistics).to(query.dtype) @ value
