"""Long texts cut into pieces whose tokens, concatenated, are those of the whole text."""

import re
from collections.abc import Iterator
from typing import Any

# BLOOM's pre-tokenizer keeps these together with adjacent blanks.
_NO_WORD = r"\s()|\[\].,!?…。，、।۔،"
_BORDER = re.compile(rf"(?= [^{_NO_WORD}])|(?<=\S\n)(?=[^{_NO_WORD}])")

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BLOOM_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"},
    "behavior": "Isolated",
    "invert": False,
}
_PRE_TOKENIZERS = (_GPT2, {"type": "Sequence", "pretokenizers": [_BLOOM_SPLIT, _BYTES]})


def added_tokens_for_cutting(tokenizer: dict[str, Any]) -> tuple[str, ...] | None:
    """The ``added_tokens`` that `cut_text` needs; None where texts must stay whole.

    ``tokenizer`` is a tokenizer.json. Its texts may be cut where the pre-tokenizer is exactly BLOOM's or
    GPT-2's, nothing rewrites a text before it, and no added token spans blanks.
    """
    pre_tokenizer = _without_offsets(tokenizer["pre_tokenizer"])
    if tokenizer["normalizer"] is not None or pre_tokenizer not in _PRE_TOKENIZERS:
        return None
    added = tokenizer["added_tokens"]
    if any(token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in added):
        return None
    return tuple(token["content"] for token in added)


def cut_text(text: str, least: int, added_tokens: tuple[str, ...]) -> Iterator[str]:
    """Cut ``text`` into pieces of at least ``least`` characters, the last one of what remains.

    A tokenizer's model never merges across the pre-tokenizer's borders. Both BLOOM's and GPT-2's have one
    before the last blank ahead of a word, whatever comes earlier, and after a line break between a non-blank
    and a word. An added token does not count as a word there. Where there is no border, the text stays whole.
    """
    start = 0
    for border in _borders(text, least, added_tokens):
        yield text[start:border]
        start = border
    if start < len(text):
        yield text[start:]


def _borders(text: str, least: int, added_tokens: tuple[str, ...]) -> Iterator[int]:
    at = least
    while match := _BORDER.search(text, at):
        at = match.start()
        if text[at] == " " and text.startswith(added_tokens, at + 1):
            at += 1
        else:
            yield at
            at += least


def _without_offsets(settings: Any) -> Any:
    """``settings`` without trim_offsets, which changes no token."""
    if isinstance(settings, list):
        return [_without_offsets(value) for value in settings]
    if isinstance(settings, dict):
        return {key: _without_offsets(value) for key, value in settings.items() if key != "trim_offsets"}
    return settings
