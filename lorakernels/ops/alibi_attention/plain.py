"""`alibi_attention` by its definition, a block of queries at a time: for few queries over many keys, as in
generation, and for devices and dtypes without kernels of their own."""

import torch

from lorakernels.ops.alibi_attention.reference import alibi_attention_reference

QUERIES = 128


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """The attention's result [B, heads, Tq, D], stored as [B, Tq, heads, D]; starts [B or 1, T] or None."""
    before = key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, query.shape[2], QUERIES):
        block = query[:, :, start : start + QUERIES]
        seen = before + start + block.shape[2]
        # the start of its document identifies a document
        ids = None if starts is None else starts[:, :seen]
        part = alibi_attention_reference(block, key[:, :, :seen], value[:, :, :seen], slopes, ids)
        parts.append(part.transpose(1, 2))
    if not parts:
        return torch.zeros_like(query)
    return torch.cat(parts, dim=1).transpose(1, 2)
