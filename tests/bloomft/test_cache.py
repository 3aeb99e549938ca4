"""What ``bloomft cache`` lists, what it removes, and what it leaves because it is used."""

import gc
import os
import time
from pathlib import Path

import pytest

from bloomft import cache
from bloomft.cache import cached_folders
from bloomft.data import token_cache
from bloomft.data.token_cache import build_token_cache
from bloomft.model import base as base_module
from bloomft.model.base import load_base
from tests.bloomft.python_process import finish, start_python

DAY = 86400


@pytest.fixture
def tokenizer(base_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def build(corpus, tokenizer, folder, pattern="*.txt"):
    return build_token_cache([str(corpus / pattern)], tokenizer, folder, progress=False)


def age(folder: Path, pattern: str, days: float) -> None:
    for path in folder.glob(pattern):
        for mark in (path / "meta.json", path / "config.json"):
            if mark.exists():
                os.utime(mark, (time.time() - days * DAY,) * 2)


def put_embedded_base(folder: Path) -> Path:
    base = folder / "tiny-base-0123456789abcdef"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(bytes(2_500_000))
    return base


def test_every_cache_is_listed_with_its_size_and_last_use(command, corpus, tokenizer, folder):
    first, second = build(corpus, tokenizer, folder), build(corpus, tokenizer, folder, "0*.txt")
    put_embedded_base(folder)
    age(folder, f"tokens-{second.key}", 3)
    age(folder, "tiny-*", 5)
    (folder / "fingerprint-0").write_text("0" * 40)
    (folder / "another folder").mkdir()
    status, output, _ = command(cache, folder)
    assert status == 0
    head, *rows, total = output.splitlines()
    assert head.split() == ["size", "documents", "tokens", "last", "used"]
    assert [row.split()[0] for row in rows] == [
        f"tokens-{first.key[:8]}",
        f"tokens-{second.key[:8]}",
        "tiny-base-01234567",
    ]
    assert rows[0].split()[3:5] == ["40", f"{first.num_tokens:,}"]
    assert rows[1].split()[3:5] == ["10", f"{second.num_tokens:,}"]
    assert rows[2].split()[1:4] == [
        "2.5",
        "MB",
        time.strftime("%Y-%m-%d", time.localtime(time.time() - 5 * DAY)),
    ]
    assert total == f"3 in {folder}, 2.5 MB"
    assert max(map(len, output.splitlines()[:-1])) <= 80


def test_the_default_is_the_folder_that_the_configuration_defaults_to(command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert command(cache)[1] == f"0 in {tmp_path / 'xdg' / 'bloomft'}, 0.0 MB\n"


def test_what_is_older_than_the_age_goes_and_nothing_else(command, corpus, tokenizer, folder):
    young, old = build(corpus, tokenizer, folder).key, build(corpus, tokenizer, folder, "0*.txt").key
    gc.collect()
    put_embedded_base(folder)
    (folder / "another folder").mkdir()
    age(folder, f"tokens-{old}", 31)
    age(folder, "tiny-*", 31)
    status, output, _ = command(cache, folder, "--prune", "30d")
    assert status == 0
    assert f"removed tokens-{old[:8]}" in output
    assert output.splitlines()[-1] == "2.5 MB removed, 1 younger left"
    left = {path.name for path in folder.iterdir()}
    assert left == {f"tokens-{young}", f"tokens-{young}.lock", "another folder"}
    command(cache, folder, "--prune", "all")
    assert {path.name for path in folder.iterdir()} == {"another folder"}
    build(corpus, tokenizer, folder)
    assert len(cached_folders(folder)) == 1


def test_opening_a_cache_is_a_use(corpus, tokenizer, folder):
    build(corpus, tokenizer, folder)
    age(folder, "tokens-*", 40)
    build(corpus, tokenizer, folder)
    (found,) = cached_folders(folder)
    assert time.time() - found.last_used < 60


USE = """
import sys
import time
from pathlib import Path
from transformers import AutoTokenizer
from bloomft.data.rows import PackedDataset
from bloomft.data.token_cache import build_token_cache
cache = build_token_cache([sys.argv[1]], AutoTokenizer.from_pretrained(sys.argv[2]), Path(sys.argv[3]))
rows = PackedDataset(cache, range(cache.num_documents), 32, pad_token_id=0, random_state=0)
del cache
print("open", flush=True)
time.sleep(600)
"""


def test_a_cache_that_another_process_uses_stays(command, corpus, base_folder, folder):
    process = start_python("-c", USE, corpus / "*.txt", base_folder, folder)
    assert process.stdout.readline() == "open\n"
    status, output, _ = command(cache, folder, "--prune", "all")
    assert status == 0
    assert "kept, in use: tokens-" in output
    assert len(cached_folders(folder)) == 1
    process.kill()
    finish(process)
    assert "removed tokens-" in command(cache, folder, "--prune", "all")[1]
    assert cached_folders(folder) == []


def test_a_base_that_is_being_loaded_stays(base_copy, tmp_path, monkeypatch):
    cached = base_copy.rename(tmp_path / "tiny-base-0123456789abcdef")
    (found,) = cached_folders(tmp_path)
    outcomes = []
    check = base_module.check_tensors

    def meanwhile(*arguments):
        outcomes.append(found.remove())
        return check(*arguments)

    monkeypatch.setattr(base_module, "check_tensors", meanwhile)
    load_base(base_module.TransformerConfig(pretrained_model_name_or_path=str(cached)))
    assert outcomes == [False]
    assert found.remove()
    assert not cached.exists()


def test_a_cache_that_is_being_removed_is_not_opened(corpus, tokenizer, folder):
    key = build(corpus, tokenizer, folder).key
    gc.collect()
    mark = folder / f"tokens-{key}" / "meta.json"
    with mark.open("rb") as file:
        assert token_cache.lock_file(file, wait=False)
        assert token_cache._open_cache(mark.parent) is None
    assert token_cache._open_cache(mark.parent) is not None


def test_without_locks_nothing_is_removed(command, corpus, tokenizer, folder, no_locks):
    build(corpus, tokenizer, folder)
    gc.collect()
    assert "kept, in use" in command(cache, folder, "--prune", "all")[1]
    assert len(cached_folders(folder)) == 1


def test_what_a_killed_removal_has_left_goes_with_the_next(command, folder):
    (folder / ".removed-0123456789abcdef" / "x").mkdir(parents=True)
    command(cache, folder, "--prune", "all")
    assert list(folder.iterdir()) == []


def test_a_damaged_cache_is_listed_and_removed(command, corpus, tokenizer, folder):
    key = build(corpus, tokenizer, folder).key
    gc.collect()
    (folder / f"tokens-{key}" / "meta.json").write_bytes(b"{")
    assert f"tokens-{key[:8]}" in command(cache, folder)[1]
    command(cache, folder, "--prune", "all")
    assert cached_folders(folder) == []


@pytest.mark.parametrize("text", ["30", "d", "-1d", "30 days", "ALL", ""])
def test_what_is_not_an_age(fail, folder, text):
    assert "expected all, or an age such as 30d" in fail(cache, folder, f"--prune={text}")


def test_one_text_under_two_row_layouts_is_cached_once(settings, run):
    run(optim__scheduler__num_training_steps=2)
    run(data__max_length=16, data__packing=False, train__resume="never")
    assert len(cached_folders(Path(settings["data"]["cache_dir"]))) == 1
