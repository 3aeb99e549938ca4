"""The definition of `alibi_attention` in plain torch; O(T²) memory, runs in any floating dtype."""

import torch

from lorakernels.ops.alibi_attention.mask import document_starts
from lorakernels.tolerance import accumulation_dtype


def alibi_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention as written in Press et al. 2021 (arXiv:2108.12409), [B, heads, Tq, D].

    query [B, heads, Tq, D] are the last Tq of the T positions of key and value [B, heads, T, D]; document_ids
    [B or 1, T]. Computed in float32, float64 for float64, and rounded once.
    """
    bias = biases(query, key, slopes, document_ids)
    scores = query.to(bias.dtype) @ key.to(bias.dtype).mT * query.shape[3] ** -0.5 + bias
    return (torch.softmax(scores, dim=-1) @ value.to(bias.dtype)).to(query.dtype)


def biases(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, document_ids: torch.Tensor | None
) -> torch.Tensor:
    """slope · (j - i) where query i sees key j, else -inf: [B or 1, heads, Tq, T] in float32 or wider."""
    wide = accumulation_dtype(query.dtype)
    queries, keys = query.shape[2], key.shape[2]
    index = torch.arange(keys, device=query.device)
    distance = index - index[keys - queries :, None]  # [Tq, T]
    hidden = distance > 0
    if document_ids is not None:
        hidden = hidden | (index < document_starts(document_ids)[:, None, keys - queries :, None])
    bias = slopes.float().to(wide)[None, :, None, None] * distance
    return bias.masked_fill(hidden, -torch.inf)
