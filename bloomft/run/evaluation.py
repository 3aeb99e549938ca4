"""The loss on rows that a run does not train on."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from transformers import BloomForCausalLM

from bloomft.batch import IGNORE_INDEX, Batch, to_device
from bloomft.data.rows import PackedDataset
from bloomft.model.sharding import is_sharded
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
    share, chosen = slice(ranks.rank, None, ranks.size), len(rows.eval_rows(max_batches))
    batches: Iterable[Batch] = rows.eval_batches(batch_size, max_batches, share)
    if is_sharded(model):
        # a block is gathered where every process uses it: process 0 has the most batches
        most = -(-chosen // (batch_size * ranks.size))
        batches = itertools.islice(itertools.chain(batches, _without_labels(rows, max_batches)), most)
    with waiting("held-out row", len(range(chosen)[share])) as wait:
        for batch in batches:
            labels += int((batch["labels"] != IGNORE_INDEX).sum())
            tensors = to_device(batch, model.device)
            with ranks.gathering():
                loss = model(**tensors, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
            total += loss
            wait.advance(len(batch["labels"]))
    model.train(was_training)
    ranks.add(total)
    return total.item() / ranks.total(labels)[0]


def _without_labels(rows: PackedDataset, max_batches: int | None) -> Iterator[Batch]:
    """The same row again and again, of which nothing is counted."""
    for batch in rows.eval_batches(1, max_batches, slice(1)):
        batch["labels"].fill_(IGNORE_INDEX)
        yield from itertools.repeat(batch)
