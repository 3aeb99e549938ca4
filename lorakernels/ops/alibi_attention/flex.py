"""`alibi_attention` on CUDA: FlexAttention (Dong et al. 2024, arXiv:2412.05496), bias and mask inside its
kernels.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from lorakernels.ops.alibi_attention.mask import BLOCK, AttentionMask

# tl.dot takes no fewer columns
LEAST_WIDTH = 16
# Dtypes, widths, one row or several, one block or several, with gradients or without: more kinds of calls
# than torch compiles for by default before it raises.
MOST_COMPILATIONS = 64


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor, mask: AttentionMask
) -> torch.Tensor:
    """`alibi_attention` for CUDA tensors, Tq = T; compiles itself where no torch.compile surrounds it."""
    if torch.compiler.is_compiling():
        return masked_attention(query, key, value, slopes, mask)
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
        return _compiled()(query, key, value, slopes, mask)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(masked_attention, fullgraph=True)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor, mask: AttentionMask
) -> torch.Tensor:
    """FlexAttention with ALiBi's bias, made and added in float32, and the mask's blocks; [B, heads, T, D]."""
    slopes, width = slopes.float(), query.shape[3]

    def add_bias(score, b, h, q, k):
        return score + slopes[h] * (k - q)

    if width < LEAST_WIDTH:
        query, key, value = (_widened(tensor) for tensor in (query, key, value))
    out = flex_attention(
        query,
        key,
        value,
        score_mod=add_bias,
        block_mask=block_mask(mask),
        scale=width**-0.5,
    )
    if width < LEAST_WIDTH:
        out = out.transpose(1, 2)[..., :width].contiguous().transpose(1, 2)
    return out


def block_mask(mask: AttentionMask) -> BlockMask:
    """The mask as FlexAttention takes it. Raises ValueError for index tensors that its kernels would misread.

    They find a row's blocks at ``row · heads of the mask · stride of the head``: the head's stride must be
    that of a contiguous tensor, although there is one head; with another one every row reads the first
    row's blocks.
    """
    blocks = mask._asdict()
    starts = blocks.pop("starts")
    for tensor in blocks.values():
        if tensor.stride(1) != tensor.stride(2) * tensor.shape[2]:
            raise ValueError(
                "mask: expected index tensors with the second stride of a contiguous tensor, got strides "
                f"{list(tensor.stride())} for shape {list(tensor.shape)}"
            )
    one_for_all = starts.shape[0] == 1

    def allowed(b, h, q, k):
        return (k <= q) & (k >= starts[0 if one_for_all else b, q])

    length = starts.shape[1]
    return BlockMask(seq_lengths=(length, length), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed, **blocks)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """tensor [B, heads, T, D] with zeros up to the least width, stored as [B, T, heads, D]."""
    return pad(tensor.transpose(1, 2), (0, LEAST_WIDTH - tensor.shape[3])).transpose(1, 2)
