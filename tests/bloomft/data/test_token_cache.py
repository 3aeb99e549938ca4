"""The token cache: what it holds, when it is built, and what a crash or a change on the way leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from bloomft.data import token_cache
from bloomft.data.documents import INSTALLED_READMES
from bloomft.data.text_pieces import cut_text
from bloomft.data.token_cache import build_token_cache
from bloomft.errors import UserError
from tests.bloomft.data.trained_tokenizers import FREQUENT_LINE, bloom_pre_tokenizer, train_tokenizer
from tests.bloomft.python_process import finish, start_python

TEXTS = ["The first text.\nIt has lines, two of them.\n", "Der zweite, grün und süß 😀.", "x"]


@pytest.fixture(scope="module")
def backend():
    return train_tokenizer(bloom_pre_tokenizer())


@pytest.fixture
def tokenizer(backend):
    copy = Tokenizer.from_str(backend.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in zip("abc", TEXTS, strict=True):
        Path(f"{name}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def tokenized(monkeypatch):
    """Counts how often anything is tokenized."""
    calls = []
    original = token_cache._tokenize
    monkeypatch.setattr(token_cache, "_tokenize", lambda *args: (calls.append(1), original(*args)))
    return calls


def build(tokenizer, patterns=("*.txt",), cache_dir=Path("cache")):
    return build_token_cache(list(patterns), tokenizer, cache_dir, progress=False)


def folders(cache_dir="cache"):
    return [path for path in Path(cache_dir).iterdir() if path.is_dir()]


def expected(tokenizer, text, prompt=""):
    def encode(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    return [*encode(prompt), *encode(text), tokenizer.eos_token_id]


def test_tokens_are_those_of_the_tokenizer_with_an_end_of_text(texts, tokenizer):
    rows = [
        {"prompt": "Question? ", "response": "Answer"},
        {"text": "plain"},
        {"prompt": "", "response": "r"},
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = build(tokenizer, ["*.txt", "rows.jsonl"])
    documents = [(text, "") for text in TEXTS] + [("Answer", "Question? "), ("plain", ""), ("r", "")]
    assert cache.num_documents == len(documents) == cache.report.documents
    for index, (text, prompt) in enumerate(documents):
        tokens, prompt_length = cache.document(index)
        assert tokens.tolist() == expected(tokenizer, text, prompt)
        assert prompt_length == len(expected(tokenizer, prompt)) - 1
    assert cache.num_tokens == len(cache.tokens) == cache.offsets[-1]
    assert cache.report.files == 4


def test_arrays_are_read_only_maps_of_the_right_width(texts, tokenizer):
    cache = build(tokenizer)
    assert cache.tokens.dtype == np.uint16
    assert cache.offsets.dtype == cache.prompt_lengths.dtype == np.int64
    tokens, _ = cache.document(1)
    assert np.shares_memory(tokens, cache.tokens)
    assert isinstance(cache.tokens.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0
    tokenizer.add_tokens([f"<extra{i}>" for i in range(65_536)])
    wide = build(tokenizer)
    assert wide.tokens.dtype == np.uint32
    assert wide.tokens.tolist() == cache.tokens.tolist()


def test_a_second_call_does_not_tokenize(texts, tokenizer, tokenized):
    first = build(tokenizer)
    Path("empty.txt").touch()
    second, third = build(tokenizer), build(tokenizer)
    assert len(tokenized) == 2
    assert second.key == third.key != first.key
    assert {f"tokens-{cache.key}" for cache in (first, second)} == {folder.name for folder in folders()}
    assert first.report.skipped_empty == 0
    assert second.report == third.report
    assert third.report.skipped_empty == 1
    assert first.tokens.tolist() == second.tokens.tolist() == third.tokens.tolist()


def test_the_key_is_content_kind_and_tokenizer(texts, tokenizer, backend, tokenized):
    backend = Tokenizer.from_str(backend.to_str())

    def builds():
        before = len(tokenized)
        build(tokenizer, ["[abc].*"])
        return len(tokenized) - before

    assert builds() == 1
    os.utime("a.txt", (1, 1))
    assert builds() == 0, "a new time is no new content"
    Path("b.txt").write_text(TEXTS[1].replace("zweite", "dritte"))
    assert builds() == 1, "same sizes, other content"
    Path("b.txt").write_text(TEXTS[0])
    Path("a.txt").write_text(TEXTS[1])
    assert builds() == 1, "order of the documents"
    Path("c.txt").write_text('{"text": "x"}')
    assert builds() == 1
    os.rename("c.txt", "c.jsonl")
    assert builds() == 1, "the same bytes, read as rows"
    tokenizer(["short", "a longer text"], padding=True, truncation=True, max_length=3)
    assert builds() == 0, "padding of an earlier call is no other tokenizer"
    tokenizer.eos_token = "<pad>"
    assert builds() == 1, "another end of text"
    tokenizer.add_tokens(["zwei"])
    assert builds() == 1, "another tokenizer"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<pad>", pad_token="<pad>")
    tokenizer.add_tokens(["drei"])
    assert builds() == 1, "another tokenizer, described by as many characters"


def test_padding_and_truncation_of_the_callers_tokenizer_stay_out_of_the_tokens(texts, tokenizer):
    plain = [build(tokenizer, cache_dir=Path("one")).document(i)[0].tolist() for i in range(3)]
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert [build(tokenizer, cache_dir=Path("two")).document(i)[0].tolist() for i in range(3)] == plain
    assert tokenizer.backend_tokenizer.padding["length"] == 64
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2


def damage_nothing(folder):
    pass


def truncate_tokens(folder):
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(10)


def flip_a_bit(folder):
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[7] ^= 1
    (folder / "tokens.bin").write_bytes(data)


def remove_offsets(folder):
    (folder / "offsets.bin").unlink()


def cut_meta(folder):
    (folder / "meta.json").write_text('{"version": 1, "dtype"')


def nest_meta(folder):
    (folder / "meta.json").write_text("[" * 10**5)


def other_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 0}))


@pytest.mark.parametrize(
    "damage",
    [damage_nothing, truncate_tokens, flip_a_bit, remove_offsets, cut_meta, nest_meta, other_version],
)
def test_a_damaged_cache_is_built_again(texts, tokenizer, tokenized, damage):
    good = build(tokenizer).tokens.tolist()
    damage(folders()[0])
    assert build(tokenizer).tokens.tolist() == good
    assert len(tokenized) == (1 if damage is damage_nothing else 2)
    assert build(tokenizer).tokens.tolist() == good
    assert len(tokenized) == (1 if damage is damage_nothing else 2)
    assert len(folders()) == 1


SCRIPT = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from tokenizers import Tokenizer
from bloomft.data import token_cache

stage, tokenizer, pattern, cache_dir = sys.argv[1:]
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if stage == "kill while writing":
    token_cache.BATCH_CHARACTERS = 10
    write = token_cache._CacheWriter.write
    def write_and_die(self):
        write(self)
        if self.num_documents == 2:
            [file.flush() for file in self._files.values()]
            die()
    token_cache._CacheWriter.write = write_and_die
if stage == "kill before renaming":
    token_cache._publish = die
tokenizer = SimpleNamespace(backend_tokenizer=Tokenizer.from_file(tokenizer), eos_token_id=0)

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024

before = memory("VmRSS:") if stage == "memory" else 0
cache = token_cache.build_token_cache([pattern], tokenizer, Path(cache_dir))
print(cache.num_documents, cache.num_tokens, int(memory("VmHWM:") - before) if stage == "memory" else 0)
"""


def start(stage, backend, pattern) -> subprocess.Popen:
    backend.save("tokenizer.json")
    return start_python("-c", SCRIPT, stage, "tokenizer.json", pattern, "cache")


@pytest.mark.parametrize("stage", ["kill while writing", "kill before renaming"])
def test_a_killed_build_leaves_nothing_that_is_used(texts, tokenizer, tokenized, stage):
    status, _, _ = finish(start(stage, tokenizer.backend_tokenizer, "*.txt"))
    assert status == -signal.SIGKILL
    (left,) = folders()
    assert ".partial-" in left.name
    assert (left / "tokens.bin").stat().st_size > 0
    cache = build(tokenizer)
    assert len(tokenized) == 1
    assert [cache.document(i)[0].tolist() for i in range(3)] == [expected(tokenizer, text) for text in TEXTS]
    (only,) = folders()
    assert only.name == left.name.partition(".")[0]


def test_the_leftover_of_another_corpus_goes_too_unless_it_is_being_built(texts, tokenizer):
    dead, alive = Path("cache/tokens-0a.partial-1"), Path("cache/tokens-0b.partial-2")
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    with open("cache/tokens-0b.lock", "ab") as lock:
        assert token_cache.lock_file(lock, wait=False)
        build(tokenizer)
        assert not dead.exists()
        assert alive.exists()


def test_two_processes_at_once_tokenize_once(texts, backend):
    Path("big.txt").write_text("\n".join(TEXTS) * 20_000)
    processes = [start("", backend, "*.txt") for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == results[1][1]
    assert sum("tokenized 4 documents" in errors for _, _, errors in results) == 1
    assert len(folders()) == 1


@pytest.mark.parametrize("damage", [damage_nothing, flip_a_bit])
def test_without_locks_a_cache_published_meanwhile_is_taken_or_replaced(
    texts, tokenizer, no_locks, monkeypatch, damage
):
    write = token_cache._write_cache

    def overtaken(*args):
        monkeypatch.setattr(token_cache, "_write_cache", write)
        build(tokenizer)
        damage(folders()[0] if ".partial-" not in folders()[0].name else folders()[1])
        write(*args)

    monkeypatch.setattr(token_cache, "_write_cache", overtaken)
    cache = build(tokenizer)
    assert cache.document(0)[0].tolist() == expected(tokenizer, TEXTS[0])
    assert len(folders()) == 1
    assert build(tokenizer).tokens.tolist() == cache.tokens.tolist()


def test_a_file_that_is_deleted_while_it_is_read_is_named(texts, tokenizer, monkeypatch):
    real = token_cache._content_key

    def delete_after(*arguments):
        key = real(*arguments)
        Path("b.txt").unlink()
        return key

    monkeypatch.setattr(token_cache, "_content_key", delete_after)
    with pytest.raises(UserError, match=r"cannot read b\.txt: No such file"):
        build(tokenizer)


def test_a_file_that_changes_while_it_is_read_leaves_no_cache(texts, tokenizer, monkeypatch):
    tokenize = token_cache._tokenize

    def change_then_tokenize(*args):
        Path("b.txt").write_text("changed after it was hashed")
        tokenize(*args)

    monkeypatch.setattr(token_cache, "_tokenize", change_then_tokenize)
    with pytest.raises(UserError, match="changed while it was read"):
        build(tokenizer)
    assert folders() == []
    monkeypatch.setattr(token_cache, "_tokenize", tokenize)
    assert build(tokenizer).document(1)[0].tolist() == expected(tokenizer, "changed after it was hashed")


def test_a_file_that_goes_away_while_it_is_read_is_named(texts, tokenizer, monkeypatch):
    new_folder = token_cache._new_folder

    def remove_then_go_on(folder):
        Path("b.txt").unlink()
        return new_folder(folder)

    monkeypatch.setattr(token_cache, "_new_folder", remove_then_go_on)
    with pytest.raises(UserError, match=r"cannot read b\.txt: No such file or directory; correct it or"):
        build(tokenizer)
    assert folders() == []


def test_an_interrupted_build_cleans_up(texts, tokenizer, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "_tokenize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizer)
    assert folders() == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded_by_batches_and_the_largest_document(texts, backend):
    # 24 MB as one document: its bytes, its text and a batch; all encodings at once would take 2 GB.
    Path("one.md").write_text(FREQUENT_LINE * (24_000_000 // len(FREQUENT_LINE)))
    status, output, errors = finish(start("memory", backend, "one.md"))
    assert status == 0, errors
    documents, tokens, megabytes = map(int, output.split())
    assert documents == 1
    assert tokens > 4_000_000
    assert megabytes < 24 * 2 + 120


def test_nothing_left_gives_the_counts(texts, tokenizer):
    Path("x.md").write_bytes(b"\xff")
    Path("y.md").write_text(" \n")
    with pytest.raises(UserError, match=r"no text to train on: .*1 with invalid UTF-8, 1 empty"):
        build(tokenizer, ["*.md"])
    assert folders() == []


def test_an_unfit_tokenizer_is_a_user_error(texts, tokenizer, backend):
    with pytest.raises(UserError, match=r"without a Rust backend.*tokenizer\.json"):
        build(SimpleNamespace(eos_token_id=0))
    with pytest.raises(UserError, match="no eos_token"):
        build(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_an_unwritable_cache_folder_is_a_user_error(texts, tokenizer, monkeypatch):
    with pytest.raises(UserError, match=r"cannot write the token cache a\.txt.*data\.cache_dir"):
        build(tokenizer, cache_dir=Path("a.txt"))

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache._CacheWriter, "write", disk_full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        build(tokenizer)
    assert folders() == []


def test_progress_lines_without_a_terminal(texts, tokenizer, capsys):
    build_token_cache(["*.txt"], tokenizer, Path("cache"))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("tokenizing 3 files")
    assert last.startswith("tokenized 3 documents in 3 files")
    build_token_cache(["*.txt"], tokenizer, Path("cache"))
    assert capsys.readouterr().err == ""


def test_a_progress_bar_on_a_terminal(texts, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    build_token_cache(["*.txt", INSTALLED_READMES], tokenizer, Path("cache"))
    assert "tokenizing" in capsys.readouterr().err


def test_a_long_document_is_cut_and_comes_out_whole(texts, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 256)
    text = Path(__file__).read_text()
    rows = [{"text": text}, {"prompt": text, "response": text[:1000]}]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = build(tokenizer, ["long.jsonl"])
    assert len(list(cut_text(text, 64, ()))) > 50
    tokens, prompt_length = cache.document(1)
    assert tokenizer.decode(cache.document(0)[0]) == text + "</s>"
    assert tokenizer.decode(tokens[:prompt_length]) == text
    assert tokenizer.decode(tokens[prompt_length:]) == text[:1000] + "</s>"


def ends_added_by_a_post_processor(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 1), ("</s>", 0)]
    )
    assert tokenizer("x")["input_ids"][-1] == 0


@pytest.mark.parametrize("prepare", [damage_nothing, ends_added_by_a_post_processor])
@pytest.mark.parametrize("piece", [4, 1 << 13])
def test_a_document_ends_with_one_end_of_text(texts, tokenizer, monkeypatch, prepare, piece):
    prepare(tokenizer)
    monkeypatch.setattr(token_cache, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 2 * piece)
    parts = [
        ("", "A boat."),
        ("", "A boat.</s>"),
        ("", "A boat." + "</s>" * 5),
        ("", "A</s>boat</s></s>."),
        ("", "A boat.</s>\n"),
        ("", "</s>"),
        ("Who?</s>", "A boat"),
        ("Who?", " A boat</s>"),
        ("Who?</s></s>", "</s></s>"),
    ]
    rows = [{"prompt": prompt, "response": text} for prompt, text in parts]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = build(tokenizer, ["rows.jsonl"])
    assert cache.num_documents == len(parts)
    for index, (prompt, text) in enumerate(parts):
        tokens, prompt_length = cache.document(index)
        while text.endswith("</s>"):
            text = text.removesuffix("</s>")
        assert tokens.tolist() == expected(tokenizer, text, prompt)
        assert prompt_length == len(expected(tokenizer, prompt)) - 1
