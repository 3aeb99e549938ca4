"""`alibi_attention` on CUDA: FlexAttention (Dong et al. 2024, arXiv:2412.05496), bias and mask inside its
kernels.

The bias table [B, heads, T] is rounded to the model's dtype before the kernel sees it: a compiler that
fuses the rounding into the kernel may leave it out. The kernel adds ``bias[k] - bias[q]``, of which the
second term is constant in a row, so that scores and their log-sum-exp stay small and float32 keeps their
digits.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lorakernels.ops.alibi_attention.slopes import alibi_bias, document_starts

BLOCK = 128


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """`alibi_attention` for CUDA tensors; compiles itself on first use where no torch.compile surrounds
    it."""
    run = masked_attention if torch.compiler.is_compiling() else _compiled()
    return run(query, key, value, slopes, document_ids)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(masked_attention, fullgraph=True)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """FlexAttention with ALiBi's bias and a block mask; [B, heads, T, D]."""
    if document_ids is None:
        starts = torch.zeros(1, query.shape[2], dtype=torch.int64, device=query.device)
    else:
        starts = document_starts(document_ids)
    packed = document_ids is not None
    positions = torch.arange(query.shape[2], device=query.device) - starts
    bias = alibi_bias(slopes, positions, query.dtype).float()  # [B or 1, heads, T]

    def add_bias(score, b, h, q, k):
        row = b if packed else 0
        return score + (bias[row, h, k] - bias[row, h, q])

    return flex_attention(query, key, value, score_mod=add_bias, block_mask=causal_blocks(starts))


def causal_blocks(starts: torch.Tensor) -> BlockMask:
    """The block mask of causal attention within documents, from each token's document start [B, T].

    Starts never fall along a row, so the first and the last query of a block say which blocks of keys it
    sees: those from the first query's start to the block itself, and wholly those before it that begin no
    earlier than the last query's start. No [T, T] tensor is made; the result holds (T / 128)² block
    numbers.
    """
    rows, length = starts.shape
    blocks = -(-length // BLOCK)
    index = torch.arange(blocks, device=starts.device)
    first_start = starts[:, index * BLOCK, None]  # [B, blocks, 1]
    last_start = starts[:, (index * BLOCK + BLOCK - 1).clamp(max=length - 1), None]
    visible = (index >= first_start // BLOCK) & (index <= index[:, None])  # [B, query blocks, key blocks]
    complete = (index[:, None] + 1) * BLOCK <= length  # as torch has it: queries past the end see nothing
    whole = (index * BLOCK >= last_start) & (index < index[:, None]) & complete

    def allowed(b, h, q, k):
        row = b if rows > 1 else 0
        return (k <= q) & (k >= starts[row, q])

    partial_blocks, whole_blocks = _listed(visible & ~whole), _listed(whole)
    return BlockMask.from_kv_blocks(
        *partial_blocks, *whole_blocks, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block has [B, 1, n], and their numbers, chosen ones first [B, 1, n,
    n]."""
    numbers = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None]
