"""ALiBi's constants: a slope per head."""

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
