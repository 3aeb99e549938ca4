"""Causal attention with linear biases (ALiBi) and document boundaries, in memory linear in the length.

A query i attends to the keys j <= i of its own document with the scores ``q_i · k_j / sqrt(D) + slope ·
p_j``, where p_j is the key's position in its document. Press et al. (2021, arXiv:2108.12409) write the bias
as ``-slope · (i - j)``; the softmax does not see the difference, which is constant in a row. BLOOM makes
``slope · p_j`` in float32 and rounds it to the model's dtype before it is added: so does this operator, and
adds and normalises in at least float32.
"""

import torch

from lorakernels.ops.alibi_attention import aten
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
    """Causal self-attention with ALiBi; scale 1/sqrt(D), no dropout.

    query, key, value [B, heads, T, D] share a shape, a device and a dtype (float16, bfloat16, float32,
    float64) and may be views with any strides; slopes [heads], floating, is a constant (see
    `alibi_slopes`). document_ids [B, T], integers: a change of id starts a new document, in which positions
    count from 0 and from which no token outside is seen, so that a packed document gets what it gets alone.
    Returns [B, heads, T, D], stored so that ``.transpose(1, 2).flatten(2)`` is a view. Differentiable once
    in query, key and value.

    On the CPU an operator of its own that saves nothing but its inputs; on CUDA FlexAttention with a block
    mask. float64 on CUDA, and devices other than these, take the plain expression, of O(T²) memory.

    Raises ValueError for shapes and devices that do not fit or slopes that require a gradient, TypeError
    for dtypes.
    """
    _check(query, key, value, slopes, document_ids)
    if query.device.type == "cpu":
        return _forward(query, key, value, slopes, document_ids)
    if query.device.type == "cuda" and query.dtype != torch.float64:
        from lorakernels.ops.alibi_attention import flex

        return flex.attention(query, key, value, slopes, document_ids)
    return alibi_attention_reference(query, key, value, slopes, document_ids)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> None:
    if query.ndim != 4 or query.shape[3] < 1:
        raise ValueError(f"query: expected shape [B, heads, T, D] with D >= 1, got {list(query.shape)}")
    batch, heads, length, _ = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name}: expected query's shape {list(query.shape)}, got {list(tensor.shape)}")
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
    if document_ids is not None:
        tensors["document_ids"] = document_ids
        if list(document_ids.shape) != [batch, length]:
            raise ValueError(
                f"document_ids: expected shape {[batch, length]}, got {list(document_ids.shape)}"
            )
        if document_ids.is_floating_point() or document_ids.is_complex():
            raise TypeError(f"document_ids: expected integers, got {document_ids.dtype}")
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")


@torch.library.custom_op("lorakernels::alibi_attention", mutates_args=(), device_types="cpu")
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    return aten.forward(query, key, value, slopes, document_ids)


@_forward.register_fake
def _(query, key, value, slopes, document_ids):
    return aten.empty_token_major(query)


@torch.library.custom_op("lorakernels::alibi_attention_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    out_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    document_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return aten.backward(out_gradient, query, key, value, slopes, document_ids)


@_backward_op.register_fake
def _(out_gradient, query, key, value, slopes, document_ids):
    return tuple(aten.empty_token_major(query) for _ in range(3))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, out_gradient):
    return *_backward_op(out_gradient, *ctx.saved_tensors), None, None


def _refuse_double_backward(ctx, *_gradients):
    raise RuntimeError("alibi_attention is differentiable once: its backward has no gradient")


_forward.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(_refuse_double_backward)
