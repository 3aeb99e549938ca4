"""The rows that a run trains on and those held out, from the files that its configuration names."""

import hashlib
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from bloomft.config.keys import DataConfig, filename_patterns
from bloomft.data.rows import PackedDataset, split_documents
from bloomft.data.token_cache import TokenCache, build_token_cache, open_token_cache
from bloomft.errors import UserError
from bloomft.progress import waiting
from bloomft.ranks import Ranks


@dataclass(frozen=True)
class TrainingData:
    """Training rows, held-out rows (None where nothing is held out) and the identity of both.

    Two runs with the same identity see the same tokens in the same order.
    """

    train: PackedDataset
    heldout: PackedDataset | None
    identity: str


def load_data(
    settings: DataConfig, tokenizer: PreTrainedTokenizerFast, ranks: Ranks | None = None
) -> TrainingData:
    """Tokenize the documents of ``data.filenames``, or find their tokens in the cache, and cut rows.

    Process 0 of ``ranks`` reads the documents; the others only open the tokens that it found or made, where
    they see the same folder. Raises `UserError` for files that cannot be read, rows longer than the tokenizer
    allows, and where nothing is left to learn.
    """
    ranks = ranks or Ranks()
    if settings.max_length > tokenizer.model_max_length:
        raise UserError(
            f"data.max_length is {settings.max_length}, but the tokenizer of the base allows at most "
            f"{tokenizer.model_max_length} tokens"
        )
    cache = _token_cache(settings, tokenizer, ranks)
    with waiting("looking for equal documents"):
        train_ids, heldout_ids, identity = ranks.from_first(lambda: _split(cache, settings))
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

    with waiting("cutting rows"):
        heldout = make_rows(heldout_ids) if len(heldout_ids) else None
        return TrainingData(make_rows(train_ids), heldout, identity)


def _token_cache(settings: DataConfig, tokenizer: PreTrainedTokenizerFast, ranks: Ranks) -> TokenCache:
    patterns, folder = filename_patterns(settings), settings.token_cache_dir
    cache = build_token_cache(patterns, tokenizer, folder) if ranks.is_first else None
    key = ranks.from_first(lambda: cache.key if cache else "")
    if cache is None:
        # another machine may have folders of its own
        cache = open_token_cache(folder, key) or build_token_cache(patterns, tokenizer, folder)
    if cache.key != key:
        raise UserError(f"process {ranks.rank}: data.filenames holds other text here than for process 0")
    return cache


def _split(cache: TokenCache, settings: DataConfig) -> tuple[np.ndarray, np.ndarray, str]:
    """Documents to train on, documents held out, and the identity of the rows that are cut from them."""
    split_state = settings.random_state if settings.split_state is None else settings.split_state
    contents = cache.contents() if settings.heldout_fraction else np.arange(cache.num_documents)
    train_ids, heldout_ids = split_documents(contents, settings.heldout_fraction, split_state)
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
    return train_ids, heldout_ids, hashlib.blake2b(repr(settled).encode(), digest_size=16).hexdigest()
