"""`alibi_attention` for fewer queries than keys, as in generation, and for devices and dtypes without kernels
of their own: by its definition, a block of queries at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lorakernels.ops.alibi_attention.reference import alibi_attention_reference, biases
from lorakernels.ops.autocast import without_autocast
from lorakernels.tolerance import accumulation_dtype

QUERIES = 128


@without_autocast
def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, starts: Tensor | None) -> Tensor:
    """The attention's result [B, heads, Tq, D], stored as [B, Tq, heads, D]; starts [B or 1, T] or None."""
    dtype, before = query.dtype, key.shape[2] - query.shape[2]
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    if query.is_cpu and not torch.is_grad_enabled():
        # torch's CPU kernel takes 16 bits and a float32 bias: no wide copy of all keys and values for a token
        run = _torch_attention
    else:
        # wide before they are cut, so that gradients of all blocks are added before they are rounded
        run = alibi_attention_reference
        query, key, value = (tensor.to(accumulation_dtype(dtype)) for tensor in (query, key, value))
    parts = [query[:, :, :0].transpose(1, 2)]
    for start in range(0, query.shape[2], QUERIES):
        block = query[:, :, start : start + QUERIES]
        seen = before + start + block.shape[2]
        # the start of its document identifies a document
        ids = None if starts is None else starts[:, :seen]
        parts.append(run(block, key[:, :, :seen], value[:, :, :seen], slopes, ids).transpose(1, 2))
    return torch.cat(parts, dim=1).to(dtype).transpose(1, 2)


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, ids: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=biases(query, key, slopes, ids))
