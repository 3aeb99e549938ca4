"""Rows for training: every token once, packed tightly, in an order that a position alone decides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomft.batch import PADDING_ID
from bloomft.data.documents import ReadReport
from bloomft.data.rows import PackedDataset, pack_lengths, split_documents
from bloomft.data.token_cache import TokenCache
from bloomft.errors import UserError

PAD = 7


def make_cache(sizes, prompts=None):
    """Documents of the given token counts; every token of the cache is unlike every other one."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    prompts = np.zeros(len(sizes), np.int64) if prompts is None else np.asarray(prompts, np.int64)
    tokens = np.arange(1000, 1000 + offsets[-1], dtype=np.uint32)
    return TokenCache(tokens, offsets, prompts, ReadReport())


def make_dataset(sizes, max_length=8, prompts=None, ids=None, random_state=0, **options):
    cache = make_cache(sizes, prompts)
    ids = np.arange(len(sizes)) if ids is None else np.asarray(ids)
    return PackedDataset(cache, ids, max_length, pad_token_id=PAD, random_state=random_state, **options)


def supervised(batch):
    """(token, the token before it) for each label that a model which shifts and minds document ids sees."""
    ids, labels, documents = (batch[key] for key in ("input_ids", "labels", "document_ids"))
    seen = (labels[:, 1:] != -100) & (documents[:, 1:] == documents[:, :-1])
    return list(zip(labels[:, 1:][seen].tolist(), ids[:, :-1][seen].tolist(), strict=True))


documents_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 12)).map(lambda pair: (pair[0], min(pair[1], pair[0] - 1))),
    min_size=1,
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(
    documents=documents_strategy,
    max_length=st.integers(2, 17),
    packing=st.booleans(),
    batch_size=st.integers(1, 5),
    random_state=st.integers(0, 2**63 - 1),
)
def test_every_token_that_follows_another_is_a_label_exactly_once(
    documents, max_length, packing, batch_size, random_state
):
    sizes, prompts = zip(*documents, strict=True)
    cache = make_cache(sizes, prompts)
    wanted = {}
    for index, (size, prompt) in enumerate(documents):
        for at in range(max(prompt, 1), size):
            token = 1000 + int(cache.offsets[index]) + at
            wanted[token] = token - 1
    try:
        dataset = make_dataset(sizes, max_length, prompts, packing=packing, random_state=random_state)
    except UserError:
        assert not wanted
        return
    batches = list(dataset.eval_batches(batch_size))
    labels = [pair for batch in batches for pair in supervised(batch)]
    assert sorted(labels) == sorted(wanted.items())
    assert dataset.num_supervised_tokens == len(wanted)
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == len(wanted)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(dataset)


@settings(max_examples=200, deadline=None)
@given(documents=documents_strategy, max_length=st.integers(2, 17), packing=st.booleans())
def test_rows_hold_whole_pieces_under_ids_of_their_own(documents, max_length, packing):
    sizes, prompts = zip(*[(size + 1, prompt) for size, prompt in documents], strict=True)
    cache = make_cache(sizes, prompts)
    dataset = make_dataset(sizes, max_length, prompts, packing=packing)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    real_tokens = positions = 0
    for batch in dataset.eval_batches(3):
        input_ids, labels, ids = batch["input_ids"], batch["labels"], batch["document_ids"]
        assert input_ids.dtype == labels.dtype == torch.int64
        assert ids.dtype == torch.int32
        width = input_ids.shape[1]
        assert input_ids.shape == labels.shape == ids.shape
        assert width == max_length if packing else width <= max_length
        positions += input_ids.numel()
        for row_tokens, row_labels, row_ids in zip(input_ids, labels, ids, strict=True):
            padding = row_tokens == PAD
            real_tokens += int((~padding).sum())
            steps = row_ids.diff()
            assert row_ids[0] == 0
            assert ((steps == 0) | (steps == 1))[~padding[1:]].all()
            assert not (padding[:-1] & ~padding[1:]).any(), "padding is at the end"
            assert (row_labels[padding] == -100).all()
            if padding.any():
                assert (row_ids[padding] == PADDING_ID).all()
            assert (row_ids[~padding] >= 0).all()
            assert packing or row_ids[~padding].max() == 0
            for piece in range(int(row_ids[~padding].max()) + 1):
                tokens = row_tokens[row_ids == piece].numpy() - 1000
                assert (np.diff(tokens) == 1).all()
                assert len(set(owner[tokens])) == 1, "one document under one id"
                in_document = tokens - cache.offsets[owner[tokens[0]]]
                expected = np.where(in_document >= prompts[owner[tokens[0]]], tokens + 1000, -100)
                assert row_labels[row_ids == piece][1:].tolist() == expected[1:].tolist()
    assert real_tokens == dataset.num_tokens
    if packing:
        assert dataset.padding_fraction == pytest.approx(1 - real_tokens / positions)
    assert 0 <= dataset.padding_fraction < 1


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    batch_size=st.integers(1, 9),
    random_state=st.integers(0, 5),
    start=st.integers(0, 30),
)
def test_batches_are_endless_epochs_and_a_position_is_exact(sizes, batch_size, random_state, start):
    def one_run(first, count):
        dataset = make_dataset(sizes, 9, random_state=random_state)
        return len(dataset), [
            dataset.batch(index * batch_size, batch_size) for index in range(first, first + count)
        ]

    rows, batches = one_run(0, start + 5)
    _, resumed = one_run(start, 5)
    for whole, again in zip(batches[start:], resumed, strict=True):
        assert all(torch.equal(whole[key], again[key]) for key in whole)
    stream = [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    assert all(len(batch["input_ids"]) == batch_size for batch in batches)
    every_row = sorted(stream[:rows])
    for epoch in range(len(stream) // rows):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == every_row
        assert len(set(every_row)) == rows


def test_the_rows_of_a_batch_are_those_from_its_position_on():
    dataset = make_dataset([9] * 7, 9)
    rows = [dataset.batch(position, 1)["input_ids"][0] for position in range(20)]
    for position, size in ((0, 5), (3, 4), (5, 9), (13, 7)):
        batch = dataset.batch(position, size)["input_ids"]
        assert torch.equal(batch, torch.stack(rows[position : position + size]))


def test_epochs_differ_and_random_state_decides():
    def order(random_state, epoch):
        dataset = make_dataset([9] * 50, 9, random_state=random_state)
        return [dataset.batch(epoch * 50 + i, 1)["input_ids"][0, 0].item() for i in range(50)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(3, 4))
    assert make_dataset([9]).batch(10**12, 2)["input_ids"].shape == (2, 8)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        make_dataset([9]).batch(-1, 1)


def test_the_order_of_an_epoch_never_changes_between_versions():
    dataset = make_dataset([8] * 6, 8, random_state=42)
    assert [dataset.batch(i, 1)["input_ids"][0, 0].item() for i in range(6)] == [
        1000,
        1040,
        1032,
        1016,
        1024,
        1008,
    ]
    train, heldout = split_documents(np.arange(10), 0.3, 42)
    assert (train.tolist(), heldout.tolist()) == ([0, 1, 2, 4, 6, 7, 9], [3, 5, 8])


def test_unpacked_rows_are_as_long_as_the_batch_needs():
    dataset = make_dataset([3, 9, 17, 30], 20, packing=False)
    assert len(dataset) == 5
    assert [batch["input_ids"].shape for batch in dataset.eval_batches(1)] == [
        (1, 20),
        (1, 20),
        (1, 16),
        (1, 16),
        (1, 8),
    ]
    assert dataset.num_tokens == 3 + 9 + 17 + 30 + 1
    assert dataset.padding_fraction == pytest.approx(1 - 60 / 80)
    assert dataset.batch(0, 5)["input_ids"].shape == (5, 20)
    assert [len(batch["labels"]) for batch in dataset.eval_batches(2)] == [2, 2, 1]


def test_only_the_chosen_documents_are_in_the_rows():
    dataset = make_dataset([5, 6, 7, 4], ids=[3, 1])
    tokens = {token for batch in dataset.eval_batches(2) for token in batch["input_ids"].flatten().tolist()}
    assert tokens - {PAD} == {*range(1005, 1011), *range(1018, 1022)}


def test_windows_of_prompt_alone_are_dropped():
    dataset = make_dataset([20], 5, prompts=[11])
    # Windows begin at 0, 4, 8, 12, 16; the first two have no label after their first token.
    assert dataset.num_supervised_tokens == 9
    assert dataset.num_tokens == 5 + 5 + 4
    first = min(
        batch["input_ids"].min().item() for batch in dataset.eval_batches(1) if batch["input_ids"].min() > PAD
    )
    assert first == 1008


@pytest.mark.parametrize(
    ("sizes", "prompts", "ids"), [([1, 1], [0, 0], None), ([4], [4], None), ([4], [0], [])]
)
def test_nothing_to_learn_is_a_user_error(sizes, prompts, ids):
    with pytest.raises(UserError, match="hold nothing to learn"):
        make_dataset(sizes, prompts=prompts, ids=np.asarray(ids, np.int64) if ids is not None else None)


def test_a_row_of_one_token_is_a_user_error():
    with pytest.raises(UserError, match=r"data\.max_length is 1"):
        make_dataset([4], 1)


def best_fit_row_count(lengths, capacity):
    """The definition: one piece after another into the row with the least space that holds it."""
    free = []
    for length in lengths:
        fitting = [space for space in free if space >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_packing_is_best_fit_decreasing(data, capacity):
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80)), reverse=True)
    rows = pack_lengths(np.array(lengths), capacity)
    used = np.bincount(rows, weights=lengths)
    assert used.min() > 0, "rows are numbered without gaps"
    assert sorted((capacity - used).tolist()) == best_fit_row_count(lengths, capacity)


def test_packing_many_short_pieces_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 600, 50_000)
    dataset = make_dataset(lengths, 1024)
    assert dataset.padding_fraction < 0.002


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 60), fraction=st.floats(0, 0.99), random_state=st.integers(0, 2**63 - 1))
def test_split_is_a_partition_with_something_on_both_sides(count, fraction, random_state):
    train, heldout = split_documents(np.arange(count), fraction, random_state)
    assert sorted([*train, *heldout]) == list(range(count))
    assert train.dtype == heldout.dtype == np.int64
    assert len(train) >= min(count, 1)
    if fraction == 0 or count < 2:
        assert len(heldout) == 0
    else:
        assert len(heldout) == min(max(round(count * fraction), 1), count - 1)
    again = split_documents(np.arange(count), fraction, random_state)
    assert np.array_equal(again[0], train)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    random_state=st.integers(0, 2**63 - 1),
)
def test_copies_of_a_text_stand_on_one_side(texts, fraction, random_state):
    contents = np.unique(texts, return_inverse=True)[1]
    train, heldout = split_documents(contents, fraction, random_state)
    assert sorted([*train, *heldout]) == list(range(len(texts)))
    assert not set(contents[train]) & set(contents[heldout])
    smallest = np.bincount(contents).min()
    if len(set(texts)) == 1:
        assert len(heldout) == 0
    else:
        assert 1 <= len(heldout) <= max(round(len(texts) * fraction), 1, smallest)
        assert len(train)


def test_equal_tokens_are_one_text():
    tokens = np.array([5, 6, 7, 5, 6, 5, 6, 7, 8], np.uint16)
    cache = TokenCache(tokens, np.array([0, 3, 5, 8, 9]), np.array([0, 1, 2, 0]), ReadReport())
    assert cache.contents().tolist() == [0, 1, 0, 2]


def test_split_depends_on_random_state_alone():
    splits = {tuple(split_documents(np.arange(100), 0.1, state)[1]) for state in range(20)}
    assert len(splits) == 20


def test_tokens_stay_in_the_memory_map(tmp_path):
    path = Path(tmp_path / "tokens.bin")
    np.arange(1000, 5000, dtype=np.uint32).tofile(path)
    tokens = np.memmap(path, np.uint32, mode="r").view(np.ndarray)
    cache = TokenCache(tokens, np.array([0, 1500, 4000]), np.zeros(2, np.int64), ReadReport())
    dataset = PackedDataset(cache, np.arange(2), 64, pad_token_id=PAD, random_state=0)
    held = sum(
        value.nbytes
        for value in vars(dataset).values()
        if isinstance(value, np.ndarray) and value is not tokens
    )
    assert dataset._cache.tokens is tokens
    assert held < tokens.nbytes / 4
