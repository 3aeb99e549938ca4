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
    """The mean loss with `rows` rows of logits at a time, recomputed in the backward pass by
    checkpointing."""
    from torch.utils.checkpoint import checkpoint

    total = sum(
        checkpoint(full_logits, part, weight, target, "sum", use_reentrant=False)
        for part, target in zip(hidden.split(rows), labels.split(rows), strict=True)
    )
    return total / (labels != -100).sum()


class _GradientInForward(torch.autograd.Function):
    """Chunks of rows whose logits give the loss and, at once, the gradient of hidden."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        rows = _published_rows(len(hidden), *weight.shape)
        supervised = (labels != -100).sum()
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).float()
            total += torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum")
            weights = logits.softmax(-1)
            kept = labels[part] != -100
            weights[kept, labels[part][kept]] -= 1
            weights[~kept] = 0
            gradient[part] = (weights / supervised).to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / supervised

    @staticmethod
    def backward(ctx, incoming):
        (gradient,) = ctx.saved_tensors
        return gradient * incoming, None, None


def _published_rows(rows: int, vocabulary: int, width: int) -> int:
    """Liger's rule: as many chunks as the logits are wider than hidden, each a power of two of rows."""
    chunks = -(-vocabulary // width)
    return 1 << max(0, -(-rows // chunks) - 1).bit_length()


def gradient_in_forward(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss as Liger publishes it, re-implemented in torch: its own kernels run on a GPU only."""
    return _GradientInForward.apply(hidden, weight, labels)
