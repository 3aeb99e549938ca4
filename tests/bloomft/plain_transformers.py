"""What plain transformers computes in the simplest way: references for losses and generated text."""

import torch
from transformers import BloomForCausalLM

from bloomft.batch import IGNORE_INDEX
from bloomft.data.rows import PackedDataset


def heldout_loss(model: BloomForCausalLM, heldout: PackedDataset) -> float:
    """In nats a label: the documents one at a time, the logits in float64."""
    losses = []
    for batch in heldout.eval_batches(1):
        (ids,), (labels,), (documents,) = (batch[key] for key in ("input_ids", "labels", "document_ids"))
        for number in range(int(documents.max()) + 1):
            own = documents == number
            with torch.no_grad():
                logits = model(ids[own][None]).logits[0, :-1].double()
            targets = labels[own][1:]
            real = targets != IGNORE_INDEX
            losses.append(torch.nn.functional.cross_entropy(logits[real], targets[real], reduction="none"))
    return torch.cat(losses).mean().item()


def greedy_without_cache(model: BloomForCausalLM, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy text by definition: the largest logit, the whole text again for every token.

    ids is [B, T]; the result [B, T + new_tokens].
    """
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids
