"""The definition of `linear_cross_entropy` in plain torch; holds all logits, runs in any floating dtype."""

import torch


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor:
    """Full logits, then `F.cross_entropy` in at least float32, as transformers' causal-LM loss does."""
    logits = hidden @ weight.T  # [T, V]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
