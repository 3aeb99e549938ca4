"""The definition of `linear_cross_entropy` in plain torch: in float64, with all logits."""

import torch
from torch import Tensor


def exact_losses(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The loss of each row in float64 [T], 0 where it is ignored; differentiable, holds all logits.

    hidden [T, H], weight [V, H], labels [T]. With z = logsumexp(other logits) - label's logit a loss is
    softplus(z): `F.cross_entropy` takes logsumexp(all) - label's logit, which for a confident row is the
    difference of two nearly equal numbers, and has no digits left of a loss of 1e-17.
    """
    logits = hidden.double() @ weight.double().T
    column = labels.clamp(min=0)[:, None]
    others = logits.scatter(1, column, -torch.inf)
    # a vocabulary of one has no others
    lowest = others.new_full((len(others), 1), torch.finfo(torch.float64).min)
    odds = torch.cat([others, lowest], 1).logsumexp(1) - logits.gather(1, column)[:, 0]
    # F.softplus has a threshold above which its gradient is 1
    losses = torch.logaddexp(odds, torch.zeros_like(odds))
    return losses.masked_fill(labels == ignore_index, 0.0)
