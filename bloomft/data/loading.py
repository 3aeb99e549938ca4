"""The rows that a run trains on and those held out, from the files that its configuration names."""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from bloomft.config.keys import DataConfig, filename_patterns
from bloomft.data.rows import PackedDataset, split_documents
from bloomft.data.token_cache import build_token_cache
from bloomft.errors import UserError
from bloomft.progress import waiting


@dataclass(frozen=True)
class TrainingData:
    """Training rows, held-out rows (None where nothing is held out) and the identity of both.

    Two runs with the same identity see the same tokens in the same order.
    """

    train: PackedDataset
    heldout: PackedDataset | None
    identity: str


def load_data(settings: DataConfig, tokenizer: PreTrainedTokenizerFast) -> TrainingData:
    """Tokenize the documents of ``data.filenames``, or find their tokens in the cache, and cut rows.

    Raises `UserError` for files that cannot be read, rows longer than the tokenizer allows, and where nothing
    is left to learn.
    """
    if settings.max_length > tokenizer.model_max_length:
        raise UserError(
            f"data.max_length is {settings.max_length}, but the tokenizer of the base allows at most "
            f"{tokenizer.model_max_length} tokens"
        )
    cache = build_token_cache(filename_patterns(settings), tokenizer, settings.token_cache_dir)
    split_state = settings.random_state if settings.split_state is None else settings.split_state
    with waiting("looking for equal documents"):
        contents = cache.contents() if settings.heldout_fraction else np.arange(cache.num_documents)
        train_ids, heldout_ids = split_documents(contents, settings.heldout_fraction, split_state)
    # padding is never attended to and never a label
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def make_rows(ids: np.ndarray) -> PackedDataset:
        return PackedDataset(
            cache,
            ids,
            settings.max_length,
            packing=settings.packing,
            pad_token_id=padding,
            random_state=settings.random_state,
        )

    settled: tuple[str | int | float, ...] = (
        cache.key,
        settings.max_length,
        settings.packing,
        settings.heldout_fraction,
        settings.random_state,
    )
    # Only where they change the rows, so that checkpoints from before they existed still match.
    if split_state != settings.random_state:
        settled += (split_state,)
    if len(np.unique(contents)) < len(contents):
        settled += ("whole texts",)
    identity = hashlib.blake2b(repr(settled).encode(), digest_size=16).hexdigest()
    with waiting("cutting rows"):
        heldout = make_rows(heldout_ids) if len(heldout_ids) else None
        return TrainingData(make_rows(train_ids), heldout, identity)
