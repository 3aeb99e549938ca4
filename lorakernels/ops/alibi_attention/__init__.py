"""Causal attention with linear biases (ALiBi) and document boundaries, in memory linear in the length.

A query i attends to the keys j <= i of its own document with the scores ``q_i · k_j / sqrt(D) + slope ·
(j - i)`` (Press et al. 2021, arXiv:2108.12409). The bias is made and added in float32, never rounded to the
model's dtype; a softmax does not see that it is counted from the query and not from the document's start.
"""

import math
from collections.abc import Sequence

import torch

from lorakernels.ops.alibi_attention import aten, plain
from lorakernels.ops.alibi_attention.mask import AttentionMask, attention_mask
from lorakernels.ops.alibi_attention.slopes import alibi_slopes
from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.autograd import differentiable_once

__all__ = ["AttentionMask", "alibi_attention", "alibi_slopes", "attention_mask", "choose_attention_kernels"]


def alibi_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    *,
    document_ids: torch.Tensor | None = None,
    mask: AttentionMask | None = None,
) -> torch.Tensor:
    """Causal self-attention with exact ALiBi; scale 1/sqrt(D), no dropout.

    query [B, heads, Tq, D], key and value [B, heads, T, D] share a device and a dtype (float16, bfloat16,
    float32, float64) and may be views with any strides; Tq <= T, and the queries are the last Tq positions.
    slopes [heads], floating, is a constant, used in float32 (see `alibi_slopes`). document_ids [B, T],
    integers: a change of id starts a new document, from which no token outside is seen, so that a packed
    document gets what it gets alone. mask, in place of document_ids, is what `attention_mask` made of them
    for all layers. Returns [B, heads, Tq, D], stored so that ``.transpose(1, 2).flatten(2)`` is a view.
    Differentiable in query, key and value, once where Tq = T.

    Tq = T takes an operator of its own on the CPU, which saves nothing but its inputs, and on CUDA
    FlexAttention, for all but float64. Everything else takes the definition, some queries at a time: memory
    is linear in T without gradients, and of O(Tq · T) with them.

    Raises ValueError for shapes and devices that do not fit, slopes that require a gradient, or document_ids
    beside a mask; TypeError for dtypes.
    """
    query, key, value = cast_for_autocast(query, key, value)
    _check(query, key, value, slopes, mask)
    batch, _, length, _ = key.shape
    if document_ids is not None:
        if mask is not None:
            raise ValueError("document_ids: expected None beside a mask, which holds them already")
        mask = attention_mask(document_ids, batch, length, key.device)
    starts = None if mask is None else mask.starts
    if query.shape[2] == length and query.device.type == "cpu":
        return _forward(query, key, value, slopes, starts)
    # the grid of a kernel cannot be empty
    by_kernels = query.device.type == "cuda" and query.dtype != torch.float64 and query.numel() > 0
    if query.shape[2] == length and by_kernels:
        from lorakernels.ops.alibi_attention import flex

        mask = attention_mask(None, batch, length, key.device) if mask is None else mask
        return flex.attention(query, key, value, slopes, mask)
    return plain.attention(query, key, value, slopes, starts)


def choose_attention_kernels(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, trained: bool = True
) -> None:
    """Choose `alibi_attention`'s kernels for queries of that shape [B, heads, T, D], measured if it is new.

    For callers that torch.compile traces: the compiled code takes the kernels chosen before for the dtype and
    D, and torch's own where none are, since a trace cannot stop to measure. Called from elsewhere,
    `alibi_attention` does this itself. trained: those of the backward pass too. Nothing happens off CUDA,
    nor for float64 and empty shapes, which take no such kernels.
    """
    if device.type == "cuda" and dtype != torch.float64 and math.prod(shape) > 0:
        from lorakernels.ops.alibi_attention import flex

        flex.choose(shape, dtype, device, trained=trained)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    mask: AttentionMask | None,
) -> None:
    if query.ndim != 4 or query.shape[3] < 1:
        raise ValueError(f"query: expected shape [B, heads, Tq, D] with D >= 1, got {list(query.shape)}")
    batch, heads, queries, width = query.shape
    if key.ndim != 4 or key.shape[2] < queries or key.shape != (batch, heads, key.shape[2], width):
        expected = f"[{batch}, {heads}, T >= {queries}, {width}]"
        raise ValueError(f"key: expected shape {expected} for query's, got {list(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {list(key.shape)}, got {list(value.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"query: expected float16, bfloat16, float32 or float64, got {query.dtype}")
    if list(slopes.shape) != [heads]:
        raise ValueError(f"slopes: expected shape [{heads}], got {list(slopes.shape)}")
    if not slopes.is_floating_point():
        raise TypeError(f"slopes: expected a floating dtype, got {slopes.dtype}")
    if slopes.requires_grad:
        raise ValueError("slopes: expected a constant, got a tensor with requires_grad=True")
    tensors = {"key": key, "value": value, "slopes": slopes}
    if mask is not None:
        tensors["mask"] = mask.starts
        rows, length = mask.starts.shape
        if length != key.shape[2] or rows not in (1, batch):
            raise ValueError(
                f"mask: expected one of {batch} rows of {key.shape[2]} tokens, got {rows} rows of {length}"
            )
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")


@torch.library.custom_op("lorakernels::alibi_attention", mutates_args=(), device_types="cpu")
@without_autocast
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    return aten.forward(query, key, value, slopes, starts)


@_forward.register_fake
def _(query, key, value, slopes, starts):
    return aten.empty_token_major(query)


@torch.library.custom_op("lorakernels::alibi_attention_backward", mutates_args=(), device_types="cpu")
@without_autocast
def _backward_op(
    out_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return aten.backward(out_gradient, query, key, value, slopes, starts)


@_backward_op.register_fake
def _(out_gradient, query, key, value, slopes, starts):
    return tuple(aten.empty_token_major(query) for _ in range(3))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, out_gradient):
    return *_backward_op(out_gradient, *ctx.saved_tensors), None, None


_forward.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(differentiable_once("alibi_attention"))
