"""Attention bias and mask for rows of several documents, in the form of transformers' own BLOOM attention."""

import torch
from torch import Tensor, nn


def document_bias(
    slopes: Tensor, document_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """transformers' alibi [B·heads, 1, T] and additive mask [B, 1, T, T], both ``dtype``.

    slopes [heads]; document_ids [B, T]: no attention between different ids; attention_mask [B, T] or None: 0
    where a token is padding, which ALiBi does not count.
    """
    B, T = document_ids.shape
    real = torch.ones_like(document_ids) if attention_mask is None else attention_mask.to(document_ids)
    counted = real.cumsum(1)
    starts = nn.functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    # Tokens counted before each position's own document: the running maximum over document starts.
    before = ((counted - real) * starts).cummax(1).values
    position = (counted - before - 1) * real
    alibi = (slopes[None, :, None, None] * position[:, None, None, :]).to(dtype)
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()
    allowed = same & causal & real.bool()[:, None, None, :]
    mask = torch.zeros(B, 1, T, T, dtype=dtype, device=document_ids.device)
    return alibi.flatten(0, 1), mask.masked_fill_(~allowed, torch.finfo(dtype).min)
