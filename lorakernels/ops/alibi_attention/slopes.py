"""ALiBi's constants: a slope per head, a position per key, and their product in the model's dtype."""

import math

import torch


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Slopes of ALiBi, float32 [num_heads], steepest first within each of the two rules.

    Powers of two n: ``2^(-8/n · (h+1))``. Other head counts: the slopes of the nearest lower power of two,
    then every second slope of the next higher one (Press et al. 2021, arXiv:2108.12409, and the authors'
    code). The base is rounded to float32 before it is raised, as in transformers' BLOOM: both give the same
    bits.

    Raises ValueError if num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(lower, torch.arange(1, lower + 1, dtype=torch.int32, device=device))
    if lower != num_heads:
        odd = torch.arange(1, 2 * (num_heads - lower) + 1, 2, dtype=torch.int32, device=device)
        slopes = torch.cat([slopes, _geometric(2 * lower, odd)])
    return slopes


def _geometric(heads: int, powers: torch.Tensor) -> torch.Tensor:
    base = torch.full((), 2.0 ** (-8.0 / heads), dtype=torch.float32, device=powers.device)
    return torch.pow(base, powers)


def key_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Position of every token from the start of its document: [B, T] int64 from contiguous ids [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index - document_starts(document_ids)


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Index of the first token of every token's document: [B, T] int64 from contiguous ids [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def alibi_bias(slopes: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``slope · position``, made in float32 and rounded to dtype: [B, heads, T] from [heads] and [B, T]."""
    return (slopes.float()[None, :, None] * positions[:, None, :]).to(dtype)
