"""The loss on rows that a run does not train on."""

import torch
from transformers import BloomForCausalLM

from bloomft.batch import IGNORE_INDEX, to_device
from bloomft.data.rows import PackedDataset
from bloomft.progress import waiting
from bloomft.ranks import Ranks


@torch.no_grad()
def evaluate(
    model: BloomForCausalLM,
    rows: PackedDataset,
    batch_size: int,
    max_batches: int | None = None,
    ranks: Ranks | None = None,
) -> float:
    """Mean loss over the labels of ``rows``, or of a fixed random choice of them, in nats per token.

    The choice is `PackedDataset.eval_rows(max_batches)`, the same for every ``batch_size``. Each of ``ranks``
    takes its share of the rows, and all return the same. Shows its progress and restores the model's mode.
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    total, labels = torch.zeros((), dtype=torch.float64, device=model.device), 0
    share = slice(ranks.rank, None, ranks.size)
    with waiting("held-out row", len(rows.eval_rows(max_batches)[share])) as wait:
        for batch in rows.eval_batches(batch_size, max_batches, share):
            labels += int((batch["labels"] != IGNORE_INDEX).sum())
            tensors = to_device(batch, model.device)
            total += model(**tensors, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
            wait.advance(len(batch["labels"]))
    model.train(was_training)
    ranks.add(total)
    return total.item() / ranks.total(labels)[0]
