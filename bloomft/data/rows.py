"""Tokens to batches: the held-out split, windows of long documents, packing of short ones, endless epochs."""

from collections.abc import Iterator

import numpy as np
import torch

from bloomft.batch import IGNORE_INDEX, PADDING_ID, Batch
from bloomft.data.token_cache import TokenCache
from bloomft.errors import UserError

# What the bound of an evaluation counts as one batch; its real batches may have any size.
EVAL_BATCH_TOKENS = 8192

# The uses of a permutation, part of its seed, so that no two of them share random numbers.
_SPLIT, _PACKING, _EPOCH, _EVALUATION = range(4)


def split_documents(
    contents: np.ndarray, heldout_fraction: float, random_state: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out document ids, both sorted [n] int64, chosen by ``random_state`` (>= 0) alone.

    ``contents`` [documents] int64 numbers the texts from 0, see `TokenCache.contents`: documents with equal
    numbers are always on the same side. ``heldout_fraction`` in [0, 1) is rounded to whole documents: at
    least one where it is above zero and there are two texts to share, and never all of them. Texts are held
    out in random order as long as they fit; where none fits, the one with the fewest documents.
    """
    num_documents = len(contents)
    wanted = round(num_documents * heldout_fraction)
    if heldout_fraction > 0:
        wanted = max(wanted, 1)
    copies = np.bincount(contents)
    if len(copies) < 2 or not wanted:
        return np.arange(num_documents), np.arange(0)
    wanted = min(wanted, num_documents - 1)
    order = contents[_permutation(num_documents, random_state, _SPLIT)]
    texts = order[np.sort(np.unique(order, return_index=True)[1])]
    sizes = copies[texts]
    chosen, count = [], 0
    for text, size in zip(texts.tolist(), sizes.tolist(), strict=True):
        if count + size <= wanted:
            chosen.append(text)
            count += size
        if count == wanted:
            break
    heldout = np.isin(contents, chosen or texts[sizes.argmin()])
    return np.flatnonzero(~heldout), np.flatnonzero(heldout)


class PackedDataset:
    """Rows of at most ``max_length`` tokens from the documents of ``cache`` that ``document_ids`` [n] names.

    A longer document is cut into windows that overlap by one token, so that each of its tokens but the first
    is a label exactly once. With ``packing``, pieces share rows, each under its own id; without, each
    piece is a row. A piece that has no label, all of it prompt, is left out. Only a few numbers per piece are
    in memory; the tokens stay in the cache. ``random_state`` >= 0 determines every order. ``report`` is that
    of the whole cache.

    The labels are the input ids, not shifted, with -100 for prompt, padding and the first token of a piece,
    which nothing before it predicts: ``labels != -100`` counts exactly what a step learns from.

    Raises `UserError` where no label is left.
    """

    def __init__(
        self,
        cache: TokenCache,
        document_ids: np.ndarray,
        max_length: int,
        *,
        packing: bool = True,
        pad_token_id: int,
        random_state: int,
    ) -> None:
        if max_length < 2:
            raise UserError(
                f"data.max_length is {max_length}: a row needs 2 tokens, one to read and one to predict"
            )
        self.max_length = max_length
        self.packing = packing
        self.report = cache.report
        self._cache = cache  # as a whole: it keeps others from removing the files
        self._pad_token_id = pad_token_id
        self._random_state = random_state
        starts, lengths, masked = _cut_windows(cache, np.asarray(document_ids, np.int64), max_length)
        labels = lengths - masked
        if not len(starts):
            raise UserError(
                f"data.filenames: {len(document_ids):,} documents hold nothing to learn: no token follows "
                "a prompt or another token; name longer texts"
            )
        # Pieces of equal length would otherwise be packed in the order of the files.
        order = _permutation(len(starts), random_state, _PACKING)
        order = order[np.argsort(-lengths[order], kind="stable")]
        starts, lengths, masked = starts[order], lengths[order], masked[order]
        rows = pack_lengths(lengths, max_length) if packing else np.arange(len(lengths))
        by_row = np.argsort(rows, kind="stable")
        self._starts, self._lengths, self._masked = starts[by_row], lengths[by_row], masked[by_row]
        self._row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        self._epoch_order: tuple[int, np.ndarray] = (-1, by_row)
        self.num_tokens = int(lengths.sum())
        self.num_supervised_tokens = int(labels.sum())

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self._row_offsets) - 1

    @property
    def padding_fraction(self) -> float:
        """Share of padding in an epoch, in [0, 1); without packing that of batches of one row, the least."""
        if self.packing:
            return 1 - self.num_tokens / (len(self) * self.max_length)
        return 1 - self.num_tokens / int(self._padded(self._lengths).sum())

    def batch(self, position: int, batch_size: int) -> Batch:
        """Rows from ``position`` >= 0 of an endless sequence of epochs; to resume, this number is enough.

        Each epoch visits every row once, in an order drawn from ``random_state`` and the epoch alone; a batch
        may span epochs. Returns input_ids [B, T] int64, labels [B, T] int64 and document_ids [B, T] int32,
        which count 0, 1, 2... in a row and are -1 on its padding. T is ``max_length``; without packing it is
        the longest row of the batch, rounded up to a multiple of 8 but not beyond ``max_length``.
        """
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        rows: list[int] = []
        while len(rows) < batch_size:
            epoch, at = divmod(position + len(rows), len(self))
            rows.extend(self._order(epoch)[at : at + batch_size - len(rows)].tolist())
        return self._collate(rows)

    def eval_rows(self, max_batches: int | None = None) -> np.ndarray:
        """The rows of an evaluation, sorted [n] int64: all, or a random choice that ``random_state`` fixes.

        The choice holds at most ``max_batches`` times `EVAL_BATCH_TOKENS` tokens, and at least one row.
        """
        if max_batches is None:
            return np.arange(len(self))
        order = _permutation(len(self), self._random_state, _EVALUATION)
        tokens = np.add.reduceat(self._lengths, self._row_offsets[:-1], dtype=np.int64)[order]
        fitting = int(np.searchsorted(np.cumsum(tokens), max_batches * EVAL_BATCH_TOKENS, side="right"))
        return np.sort(order[: max(fitting, 1)])

    def eval_batches(
        self, batch_size: int, max_batches: int | None = None, share: slice = slice(None)
    ) -> Iterator[Batch]:
        """Each of `eval_rows`, or of a ``share`` of them, once, in a fixed order.

        In batches as `batch` returns them; the last may be smaller. Which rows they are does not depend on
        ``batch_size``.
        """
        rows = self.eval_rows(max_batches)[share]
        for first in range(0, len(rows), batch_size):
            yield self._collate(rows[first : first + batch_size].tolist())

    def _order(self, epoch: int) -> np.ndarray:
        known, order = self._epoch_order
        if known != epoch:
            order = _permutation(len(self), self._random_state, _EPOCH, epoch)
            self._epoch_order = (epoch, order)
        return order

    def _padded(self, lengths: np.ndarray) -> np.ndarray:
        return np.minimum((lengths + 7) // 8 * 8, self.max_length)

    def _collate(self, rows: list[int]) -> Batch:
        pieces = [range(self._row_offsets[row], self._row_offsets[row + 1]) for row in rows]
        width = self.max_length
        if not self.packing:
            width = int(self._padded(max(self._lengths[row] for row in rows)))
        input_ids = np.full((len(rows), width), self._pad_token_id, np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        document_ids = np.empty((len(rows), width), np.int32)
        for b, row in enumerate(pieces):
            at = 0
            for document, piece in enumerate(row):
                start, end = int(self._starts[piece]), at + int(self._lengths[piece])
                tokens = self._cache.tokens[start : start + end - at]
                input_ids[b, at:end] = tokens
                skip = int(self._masked[piece])
                labels[b, at + skip : end] = tokens[skip:]
                document_ids[b, at:end] = document
                at = end
            document_ids[b, at:] = PADDING_ID
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "document_ids": torch.from_numpy(document_ids),
        }


def pack_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: the row [n] int64 of each of ``lengths`` [n], sorted from long to short.

    Lengths are from 1 to ``capacity``. A piece goes to the row with the least space that holds it. Rows with
    equal space are interchangeable, and so are equal pieces, so whole groups are placed at once: a row whose
    space is the least that fits takes space // length pieces before any other row is looked at.
    """
    rows = np.empty(len(lengths), np.int64)
    # Rows by free space; bit f of ``open_spaces`` is set where some row has f tokens left.
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_spaces = 0
    num_rows = placed = 0
    groups, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(groups[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = open_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                candidates = by_space[space]
            else:
                space = capacity
                new = -(-count // (capacity // length))
                candidates = list(range(num_rows, num_rows + new))
                num_rows += new
            each = space // length
            filled = min(len(candidates), count // each)
            # One more row takes what is left of the group, if it is too little to fill that row's share.
            rest = min(count - filled * each, each) if filled < len(candidates) else 0
            chosen = candidates[len(candidates) - filled :]
            del candidates[len(candidates) - filled :]
            rows[placed : placed + filled * each] = np.repeat(chosen, each)
            placed += filled * each
            moved = [(chosen, space - each * length)]
            if rest:
                last = candidates.pop()
                rows[placed : placed + rest] = last
                placed += rest
                moved.append(([last], space - rest * length))
            count -= filled * each + rest
            if fitting and not candidates:
                open_spaces &= ~(1 << space)
            for ids, left in moved:
                if ids and left:
                    by_space[left].extend(ids)
                    open_spaces |= 1 << left
    return rows


def _cut_windows(
    cache: TokenCache, document_ids: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces with a label: first token in the cache, length, and how many tokens of its front are masked."""
    begins = cache.offsets[document_ids]
    sizes = cache.offsets[document_ids + 1] - begins
    stride = max_length - 1
    windows = np.maximum(-(-(sizes - 1) // stride), 1)
    document = np.repeat(np.arange(len(document_ids)), windows)
    number = np.arange(len(document)) - np.repeat(np.cumsum(windows) - windows, windows)
    begin = number * stride
    lengths = np.minimum(sizes[document] - begin, max_length)
    masked = np.clip(cache.prompt_lengths[document_ids][document] - begin, 1, lengths)
    keep = masked < lengths
    return (
        (begins[document] + begin)[keep],
        lengths[keep].astype(np.int32),
        masked[keep].astype(np.int32),
    )


def _permutation(size: int, random_state: int, *key: int) -> np.ndarray:
    """A permutation [size] int64, from raw bits, which numpy keeps the same in every version."""
    generator = np.random.PCG64(np.random.SeedSequence(random_state, spawn_key=key))
    return np.argsort(generator.random_raw(size), kind="stable")
