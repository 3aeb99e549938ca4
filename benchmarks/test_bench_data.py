"""Text to tokens, lengths to rows, rows to batches: each against a plain rival that gives the same."""

import bisect
import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import interleave
from bloomft.data.documents import ReadReport
from bloomft.data.rows import PackedDataset, pack_lengths
from bloomft.data.token_cache import TokenCache, build_token_cache

TEXT_BYTES = 4_000_000
MAX_LENGTH = 2048
OURS, ONE_BY_ONE, BISECT = "bloomft", "transformers, one by one", "best fit with bisect"
SLICES = "slices without boundaries"


def best_fit_with_bisect(lengths, capacity):
    """Best-fit decreasing over a sorted list of free spaces, a piece at a time."""
    spaces, rows = [], []
    num_rows = 0
    for length in lengths.tolist():
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            space, row = spaces.pop(at)
        else:
            space, row = capacity, num_rows
            num_rows += 1
        rows.append(row)
        if space > length:
            bisect.insort(spaces, (space - length, row))
    return np.array(rows)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A few megabytes of the standard library as one folder of files, and their texts in order."""
    folder = tmp_path_factory.mktemp("sources")
    texts = {}
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and size < TEXT_BYTES:
            texts[path.name] = text
            size += len(text)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder, [texts[name] for name in sorted(texts)]


@pytest.fixture(scope="module")
def tokenizer(sources):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[^(\\s|[.,!?…。，、।۔،])]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sources[1][:40], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.benchmark(group="data")
def test_tokenize(benchmark, sources, tokenizer, tmp_path):
    folder, texts = sources
    fresh = (tmp_path / f"cache{number}" for number in itertools.count())

    def with_cache(cache_dir):
        return build_token_cache([f"{folder}/*.py"], tokenizer, cache_dir, progress=False).tokens

    def one_by_one():
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 0] for text in texts]
        return np.concatenate([np.array(document, np.uint16) for document in ids])

    tokens, expected = with_cache(tmp_path / "first"), one_by_one()
    interleave.require_right({OURS: [] if np.array_equal(tokens, expected) else ["other tokens"]})
    rivals = {
        ONE_BY_ONE: one_by_one,
        OURS: lambda: with_cache(next(fresh)),
        f"{OURS}, cache kept": lambda: with_cache(tmp_path / "first"),
    }
    counts = {"unit": "tokens", "number": len(tokens)}
    title = f"text to {len(tokens)} tokens"
    interleave.compare(benchmark, rivals, floor=ONE_BY_ONE, rounds=3, warmup=1, title=title, counts=counts)


@pytest.fixture(scope="module")
def lengths():
    drawn = np.random.default_rng(0).lognormal(5.5, 1, 200_000).astype(np.int32)
    return np.sort(np.clip(drawn, 2, MAX_LENGTH))[::-1].copy()


@pytest.mark.benchmark(group="data")
def test_pack(benchmark, lengths):
    ours, plain = pack_lengths(lengths, MAX_LENGTH), best_fit_with_bisect(lengths, MAX_LENGTH)
    filled = [np.sort(np.bincount(rows, weights=lengths)) for rows in (ours, plain)]
    interleave.require_right({OURS: [] if np.array_equal(*filled) else ["rows filled otherwise"]})
    rivals = {
        BISECT: lambda: best_fit_with_bisect(lengths, MAX_LENGTH),
        OURS: lambda: pack_lengths(lengths, MAX_LENGTH),
    }
    counts = {"unit": "pieces", "number": len(lengths)}
    title = f"{len(lengths)} lengths to rows"
    interleave.compare(benchmark, rivals, floor=BISECT, rounds=3, title=title, counts=counts)


@pytest.mark.benchmark(group="data")
def test_batch(benchmark, lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (np.arange(offsets[-1]) % 65_521).astype(np.uint16)
    cache = TokenCache(tokens, offsets, np.zeros(len(lengths), np.int64), ReadReport())
    dataset = PackedDataset(cache, np.arange(len(lengths)), MAX_LENGTH, pad_token_id=3, random_state=0)
    numbers = itertools.count()

    def slices():
        """The floor: whole rows of the corpus as they come, no labels masked, no documents distinguished."""
        start = next(numbers) * 8 * MAX_LENGTH % (len(tokens) - 8 * MAX_LENGTH)
        rows = tokens[start : start + 8 * MAX_LENGTH].reshape(8, MAX_LENGTH).astype(np.int64)
        return {"input_ids": torch.from_numpy(rows), "labels": torch.from_numpy(rows.copy())}

    batch = dataset.batch(0, 8)
    is_label = batch["labels"][:, 1:] != -100
    steps = batch["input_ids"].diff() % 65_521
    wrong = [] if (steps[is_label] == 1).all() else ["a label that does not follow its token in the corpus"]
    wrong += [] if dataset.num_supervised_tokens == len(tokens) - len(lengths) else ["labels are missing"]
    interleave.require_right({OURS: wrong})
    rivals = {SLICES: slices, OURS: lambda: dataset.batch(8 * next(numbers), 8)}
    counts = {"unit": "tokens", "number": 8 * MAX_LENGTH}
    title = f"batches of 8 x {MAX_LENGTH} tokens"
    interleave.compare(benchmark, rivals, floor=SLICES, rounds=50, title=title, counts=counts)
