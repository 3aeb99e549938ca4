"""Text to tokens, lengths to rows, rows to batches: each against a plain rival, once both agree."""

import bisect
import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bloomft.data import PackedDataset, pack_lengths
from bloomft.documents import ReadReport
from bloomft.token_cache import TokenCache, build_token_cache

TEXT_BYTES = 4_000_000
MAX_LENGTH = 2048


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


@pytest.mark.benchmark(group="tokenize")
@pytest.mark.parametrize("way", ["token_cache", "transformers_one_by_one", "token_cache_again"])
def test_tokenize(benchmark, sources, tokenizer, tmp_path, way):
    folder, texts = sources
    fresh = (tmp_path / f"cache{number}" for number in itertools.count())

    def with_cache(cache_dir):
        return build_token_cache([f"{folder}/*.py"], tokenizer, cache_dir, progress=False).tokens

    def one_by_one():
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 0] for text in texts]
        return np.concatenate([np.array(document, np.uint16) for document in ids])

    assert np.array_equal(with_cache(tmp_path / "first"), one_by_one())
    if way == "token_cache":
        tokens = benchmark.pedantic(with_cache, setup=lambda: ((next(fresh),), {}), rounds=3)
    elif way == "token_cache_again":
        tokens = benchmark.pedantic(with_cache, args=(tmp_path / "first",), rounds=3)
    else:
        tokens = benchmark.pedantic(one_by_one, rounds=3)
    benchmark.extra_info["tokens_per_second"] = len(tokens) / benchmark.stats["median"]


@pytest.fixture(scope="module")
def lengths():
    drawn = np.random.default_rng(0).lognormal(5.5, 1, 200_000).astype(np.int32)
    return np.sort(np.clip(drawn, 2, MAX_LENGTH))[::-1].copy()


@pytest.mark.benchmark(group="pack")
@pytest.mark.parametrize("pack", [pack_lengths, best_fit_with_bisect])
def test_pack(benchmark, lengths, pack):
    ours, rival = pack_lengths(lengths, MAX_LENGTH), best_fit_with_bisect(lengths, MAX_LENGTH)
    assert np.array_equal(*(np.sort(np.bincount(rows, weights=lengths)) for rows in (ours, rival)))
    benchmark.pedantic(pack, args=(lengths, MAX_LENGTH), rounds=3)
    benchmark.extra_info["pieces_per_second"] = len(lengths) / benchmark.stats["median"]


@pytest.mark.benchmark(group="batch")
@pytest.mark.parametrize("way", ["packed", "slices_without_boundaries"])
def test_batch(benchmark, lengths, way):
    torch.set_num_threads(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (np.arange(offsets[-1]) % 65_521).astype(np.uint16)
    cache = TokenCache(tokens, offsets, np.zeros(len(lengths), np.int64), ReadReport())
    dataset = PackedDataset(cache, np.arange(len(lengths)), MAX_LENGTH, pad_token_id=3, random_state=0)
    numbers = itertools.count()

    def packed():
        return dataset.batch(next(numbers), 8)

    def slices():
        """The floor: whole rows of the corpus as they come, no labels masked, no documents told apart."""
        start = next(numbers) * 8 * MAX_LENGTH % (len(tokens) - 8 * MAX_LENGTH)
        rows = tokens[start : start + 8 * MAX_LENGTH].reshape(8, MAX_LENGTH).astype(np.int64)
        return {"input_ids": torch.from_numpy(rows), "labels": torch.from_numpy(rows.copy())}

    assert dataset.num_supervised_tokens == len(tokens) - len(lengths)
    batch = dataset.batch(0, 8)
    is_label = batch["labels"][:, 1:] != -100
    steps = batch["input_ids"].diff() % 65_521
    assert (steps[is_label] == 1).all(), "a label follows the token before it in the corpus"
    benchmark.pedantic(packed if way == "packed" else slices, rounds=50, warmup_rounds=5)
    benchmark.extra_info["tokens_per_second"] = 8 * MAX_LENGTH / benchmark.stats["median"]
