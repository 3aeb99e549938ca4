"""Byte-level tokenizers, trained in a moment."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bloomft.data import token_cache

FREQUENT_LINE = "frequent lines are merged to few tokens\n"

BLOOM_SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"


def train_tokenizer(pre_tokenizer, vocabulary=600):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Blanks at the end of a text: GPT-2 splits them otherwise, so only here can they become one token.
    blanks = ["a\n\n", "b \n", "c\r\n", "d  ", "a\n\nb \n c.\n(d).\n1\n2"]
    code = Path(token_cache.__file__).read_text()
    tokenizer.train_from_iterator([code, FREQUENT_LINE * 100, *blanks * 200], trainer)
    return tokenizer


def bloom_pre_tokenizer():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
