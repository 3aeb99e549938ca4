"""FlexAttention's launches, which torch.compile writes and a trace cannot run: one forward, two backward.

That many kernels stand in inductor's code for sm_90 of `flex.masked_attention`: the forward; in the backward
the row sums of out · out_gradient, then one kernel for the three gradients. Bytes count each tensor once, and
FLOPs the pairs of query and key that causality allows, documents left aside.
"""

from typing import Any

import torch
from torch import Tensor

from lorakernels.ops.alibi_attention.aten import empty_token_major
from lorakernels.trace.record import Launch, Trace, described, footprint, is_wide


def stand_in(trace: Trace) -> Any:
    """A function for `flex_attention` that counts launches in trace and returns a tensor without data."""

    def flex_attention(query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> Tensor:
        return _Attention.apply(query, key, value, trace)

    return flex_attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, trace):
        out = empty_token_major(query)
        # the logarithm of each row's sum
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        products = 2 * _pair_flops(query)
        trace.launch(_launch("flex_attention", [query, key, value], [out, sums], products))
        ctx.trace = trace
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx, out_gradient):
        query, key, value, out, sums = ctx.saved_tensors
        row_sums = torch.empty_like(sums)
        gradients = [empty_token_major(query) for _ in range(3)]
        ctx.trace.launch(_launch("flex_attention_backward_sums", [out, out_gradient], [row_sums], 0))
        # scores and weights again, then dV, dP, dQ and dK
        read, products = [query, key, value, out_gradient, sums, row_sums], 5 * _pair_flops(query)
        ctx.trace.launch(_launch("flex_attention_backward", read, gradients, products))
        return *gradients, None


def _pair_flops(query: Tensor) -> int:
    """FLOPs of one product over all pairs of a query and a key up to it."""
    batch, heads, length, width = query.shape
    return batch * heads * length * (length + 1) * width


def _launch(name: str, read: list[Tensor], written: list[Tensor], flops: int) -> Launch:
    tensors = f"{', '.join(map(described, read))} -> {', '.join(map(described, written))}"
    wide = is_wide(read[0].dtype)
    return Launch("flex", name, tensors, sum(map(footprint, read)), sum(map(footprint, written)), flops, wide)
