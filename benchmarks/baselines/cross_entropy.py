"""The vocabulary loss as users write it: what `linear_cross_entropy` is compared with, in error, time and
memory."""

import torch


def full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """All logits, widened to float32 from 16 bits as transformers does, then F.cross_entropy."""
    logits = hidden @ weight.T
    if logits.dtype.itemsize == 2:
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def row_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int = 256
) -> torch.Tensor:
    """The mean loss with `rows` rows of logits at a time, made again in the backward pass by
    checkpointing."""
    from torch.utils.checkpoint import checkpoint

    total = sum(
        checkpoint(full_logits, part, weight, target, "sum", use_reentrant=False)
        for part, target in zip(hidden.split(rows), labels.split(rows), strict=True)
    )
    return total / (labels != -100).sum()
