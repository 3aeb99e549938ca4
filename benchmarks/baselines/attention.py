"""Causal ALiBi attention as others compute it; query, key, value [B, heads, T, D], slopes [heads] -> [B,
heads, T, D]."""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention, softmax


def _bias(query: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """[heads, 1, T], made in float32 and rounded to the model's dtype."""
    return (slopes[:, None, None] * torch.arange(query.shape[2], device=query.device)).to(query.dtype)


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """transformers' BLOOM: scores and bias in the model's dtype, softmax in float32, probabilities rounded
    back."""
    batch, heads, length, width = query.shape
    flat = [tensor.reshape(batch * heads, length, width) for tensor in (query, key, value)]
    bias = _bias(query, slopes).repeat(batch, 1, 1)
    scores = bias.baddbmm(flat[0], flat[1].mT, beta=1.0, alpha=width**-0.5).view(batch, heads, length, length)
    lowest = torch.finfo(query.dtype).min
    mask = torch.full((length, length), lowest, dtype=query.dtype, device=query.device).triu(1)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = softmax(scores + mask, dim=-1, dtype=statistics).to(query.dtype)
    return torch.bmm(weights.view(batch * heads, length, length), flat[2]).view(query.shape)


def sdpa_with_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """torch's attention with an explicit [1, heads, T, T] bias that holds the causal mask."""
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    bias = _bias(query, slopes).expand(-1, length, -1).masked_fill(future, -torch.inf)
    return scaled_dot_product_attention(query, key, value, attn_mask=bias[None])


def sdpa_with_extra_dimension(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """torch's causal attention without a mask: the bias is one more head dimension, padded to 16."""
    batch, heads, length, width = query.shape
    one = torch.full((batch, heads, length, 1), width**0.5, dtype=query.dtype, device=query.device)
    bias = _bias(query, slopes).mT.expand(batch, heads, length, 1)
    query, key = pad(torch.cat([query, one], -1), (0, 15)), pad(torch.cat([key, bias], -1), (0, 15))
    out = scaled_dot_product_attention(query, key, pad(value, (0, 16)), is_causal=True, scale=width**-0.5)
    return out[..., :width]


def sdpa_by_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """The CPU kernel under torch's attention, given a causal flag and a bias that it broadcasts over the
    queries."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, attn_mask=_bias(query, slopes)[None])[0]
