"""The token cache of a corpus in pieces: the tokens of every whole text, whatever the tokenizer."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bloomft.data import token_cache
from bloomft.data.text_pieces import added_tokens_for_cutting, cut_text
from bloomft.data.token_cache import build_token_cache
from bloomft.errors import UserError
from tests.bloomft.data.trained_tokenizers import bloom_pre_tokenizer, train_tokenizer

FRAGMENTS = [
    *"a1é😀.(|[]…\"'\n\t ",
    *[
        "word",
        " two",
        "\n\n",
        " \n",
        "\r\n",
        "  ",
        "\n    ",
        "'s",
        "\u3000",
        "\x1c",
        "e\u0301",
        " \u0301",
        "ﬁ",
    ],
    *["</s>", " </s>", "<pad>", "<x>", " <x>", "<a b>", "New York", "字。", "字", "123", "Éa", "_", "▁"],
]
SPECIAL = ["</s>", "<pad>", "<unk>"]


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    texts = ["".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 40))) for _ in range(count)]
    return [text for text in texts if text.strip()]


def byte_level(**options):
    return train_tokenizer(pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options), 900)


def bloom():
    return train_tokenizer(bloom_pre_tokenizer(), 900)


def bloom_with(normalizer):
    tokenizer = bloom()
    tokenizer.normalizer = normalizer
    return tokenizer


def bloom_adding(*tokens, special=False):
    tokenizer = bloom()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
    return tokenizer


def gpt2_adding(*tokens):
    tokenizer = byte_level()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def trained(model, trainer, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(random_texts(400), trainer)
    return tokenizer


def bpe(pre_tokenizer, normalizer=None):
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, normalizer)


def unigram(pre_tokenizer, normalizer=None):
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizer, normalizer)


def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


def word_level():
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.Whitespace())


def ends_of_its_own():
    tokenizer = bloom()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 1), ("</s>", 0)]
    )
    return tokenizer


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

CUT = {
    "bloom": bloom,
    "gpt2": byte_level,
    "gpt2_untrimmed": lambda: byte_level(trim_offsets=False),
    "ends_of_its_own": ends_of_its_own,
    "plain_added": lambda: bloom_adding("<x>", "word"),
    "plain_added_to_gpt2": lambda: gpt2_adding("<x>", "word", "two"),
    "single_word": lambda: bloom_adding(AddedToken("two", single_word=True), special=True),
}
WHOLE = {
    "prefix_space": lambda: byte_level(add_prefix_space=True),
    "nfc": lambda: bloom_with(normalizers.NFC()),
    "nfkc": lambda: bloom_with(normalizers.NFKC()),
    "lowercase": lambda: bloom_with(normalizers.Lowercase()),
    "strip": lambda: bloom_with(normalizers.Strip()),
    "prepend": lambda: bloom_with(normalizers.Prepend("▁")),
    "replace": lambda: bloom_with(normalizers.Replace(Regex(r"\s+"), " ")),
    "blank_in_added": lambda: bloom_adding("<a b>", "New York"),
    "lstrip": lambda: bloom_adding(AddedToken("<x>", lstrip=True)),
    "rstrip": lambda: bloom_adding(AddedToken("<x>", rstrip=True), special=True),
    "digits": lambda: train_tokenizer(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bloom_pre_tokenizer()])
    ),
    "llama3": lambda: train_tokenizer(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "bytes_without_words": lambda: byte_level(use_regex=False),
    "no_pre_tokenizer": lambda: bpe(None),
    "metaspace_always": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace_first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace_never": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "metaspace_unsplit": lambda: bpe(pre_tokenizers.Metaspace(split=False)),
    "unigram": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "unigram_whole": lambda: unigram(None),
    "llama2": lambda: bpe(
        None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "word_piece": word_piece,
    "word_level": word_level,
    "scripts": lambda: bpe(pre_tokenizers.UnicodeScripts()),
}


@pytest.mark.parametrize("splits_special_tokens", [False, True])
@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_the_cache_holds_the_tokens_of_whole_texts(tmp_path, monkeypatch, name, splits_special_tokens):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 5)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 700)
    backend = (CUT | WHOLE)[name]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        split_special_tokens=splits_special_tokens,
    )
    texts = random_texts(300)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    cache = build_token_cache([str(tmp_path / "rows.jsonl")], tokenizer, tmp_path / "cache", progress=False)
    assert cache.num_documents == len(texts)
    eos = tokenizer.eos_token_id
    for index, text in enumerate(texts):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        while expected and expected[-1] == eos:
            expected.pop()
        assert cache.document(index)[0].tolist() == [*expected, eos], repr(text)


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_texts_are_cut_for_the_pre_tokenizers_that_are_understood(name):
    state = json.loads((CUT | WHOLE)[name]().to_str())
    assert (added_tokens_for_cutting(state) is not None) == (name in CUT)


@pytest.fixture(scope="module", params=CUT)
def cut_backend(request):
    return CUT[request.param]()


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=60), least=st.integers(1, 30))
def test_pieces_have_the_text_and_its_tokens(cut_backend, parts, least):
    text = "".join(parts)
    pieces = list(cut_text(text, least, added_tokens_for_cutting(json.loads(cut_backend.to_str()))))
    assert "".join(pieces) == text
    assert all(len(piece) >= least for piece in pieces[:-1])
    encodings = cut_backend.encode_batch(pieces, add_special_tokens=False)
    ids = list(itertools.chain.from_iterable(encoding.ids for encoding in encodings))
    assert ids == cut_backend.encode(text, add_special_tokens=False).ids


def test_words_are_where_a_text_is_cut():
    text = "word two\nlines <x> " * 100
    assert max(map(len, cut_text(text, 64, ("<x>",)))) < 64 + len("lines <x> ")
    assert list(cut_text("x" * 1000, 64, ())) == ["x" * 1000]
    assert list(cut_text("", 64, ())) == []


def test_random_tokens_and_tokenizers_in_python_are_refused(tmp_path):
    class Words:
        def pre_tokenize(self, text):
            text.split(lambda _index, part: [part])

    (tmp_path / "a.txt").write_text("word")
    random_merges, in_python = bloom(), bloom()
    random_merges.model.dropout = 0.1
    in_python.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    for backend, expected in ((random_merges, "dropout 0.1"), (in_python, "cannot be written")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bloom(), eos_token="</s>", pad_token="<pad>")
        tokenizer._tokenizer = backend
        with pytest.raises(UserError, match=expected) as caught:
            build_token_cache([str(tmp_path / "a.txt")], tokenizer, tmp_path / "cache", progress=False)
        assert "\n" not in str(caught.value)
