"""Files become documents, or one line that names the file."""

import json
import os
from pathlib import Path

import pytest

from bloomft.data import documents
from bloomft.data.documents import INSTALLED_READMES, Document, ReadReport, list_files, read_documents
from bloomft.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(*files):
    report = ReadReport()
    return list(read_documents([Path(file) for file in files], report)), report


def write_rows(name, *rows):
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def test_list_files_globs_sorts_and_lists_each_file_once(monkeypatch):
    for name in ("b.md", "a.md", "deep/er/c.md", "deep/d.txt", "odd[1].md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    os.symlink("a.md", "z.md")
    monkeypatch.setenv("HOME", str(Path("deep").resolve()))

    assert list_files(["**/*.md"]) == [Path(n) for n in ("a.md", "b.md", "deep/er/c.md", "odd[1].md")]
    assert list_files(["b.md", "./b.md", "*.md", "deep/../b.md"]) == [
        Path(n) for n in ("a.md", "b.md", "odd[1].md")
    ]
    assert list_files(["odd[1].md"]) == [Path("odd[1].md")]
    assert [file.name for file in list_files(["~/*.txt"])] == ["d.txt"]
    assert list_files(["b.md", INSTALLED_READMES]) == [Path("b.md"), Path(INSTALLED_READMES)]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "data.filenames is empty"),
        (["a.txt", "missing/*.txt"], r"'missing/\*.txt' matches no file"),
        (["folder"], "'folder' matches folders only"),
    ],
)
def test_a_pattern_without_files_is_named(patterns, message):
    Path("a.txt").write_text("text")
    Path("folder").mkdir()
    with pytest.raises(UserError, match=message):
        list_files(patterns)


def test_plain_files_are_one_document_each_and_bad_ones_are_counted():
    Path("bom.txt").write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe\r\n\r\nzwei\n")
    Path("latin1.txt").write_bytes(b"gr\xfc\xdfe")
    Path("blank.txt").write_text(" \n\t\u00a0\n")
    Path("empty.txt").touch()
    found, report = read("bom.txt", "latin1.txt", "blank.txt", "empty.txt")
    assert found == [Document("grüße\r\n\r\nzwei\n")]
    assert report == ReadReport(files=4, documents=1, skipped_encoding=1, skipped_empty=2)
    assert "1 with invalid UTF-8, 2 empty" in report.describe()


def test_jsonl_rows():
    rows = [
        {"text": "one\u2028line"},
        {"prompt": "Q: ", "response": "A", "id": 7},
        {"prompt": "", "response": "only"},
        {"text": "  "},
        {"prompt": "asked", "response": "\n"},
    ]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    bad_bytes = b'{"text": "\xff"}\n\n  \n'
    half_a_pair = b'{"text": "\\ud800"}\n'
    Path("rows.JSONL").write_bytes(
        b"\xef\xbb\xbf" + content + bad_bytes + half_a_pair + b'{"text": "\\ud83d\\ude00"}'
    )
    found, report = read("rows.JSONL")
    assert found == [
        Document("one\u2028line"),
        Document("A", prompt="Q: "),
        Document("only"),
        Document("😀"),
    ]
    assert report == ReadReport(files=1, documents=4, skipped_encoding=2, skipped_empty=2)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"text": "cut', "not JSON"),
        ("[" * 100_000, "cannot be read"),
        ('{"n": ' + "1" * 5000 + "}", "cannot be read"),
        ('["text"]', "a JSON list and not an object"),
        ("{}", "keys are none"),
        ('{"txt": "a"}', "keys are 'txt'"),
        ('{"prompt": "a", "respnse": "b"}', "keys are 'prompt', 'respnse'"),
        ('{"text": "a", "prompt": "b"}', "keys are 'text', 'prompt'"),
        ('{"text": null}', "'text' is null and not a string"),
        ('{"prompt": ["a"], "response": "b"}', "'prompt' is .* and not a string"),
    ],
)
def test_a_wrong_row_is_one_line_with_file_and_line(row, problem):
    write_rows("rows.jsonl", {"text": "good"}, "\n", row)
    with pytest.raises(UserError, match=rf"^rows.jsonl:3: .*{problem}.*expected .*\"text\"") as caught:
        read("rows.jsonl")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("suffix", ["csv", "json", "ndjson", "parquet", "gz", "jsonl.gz", "JSON"])
def test_tables_and_archives_are_refused_by_name(suffix):
    Path("a.txt").write_text("text")
    Path(f"rows.{suffix}").write_text("a,b")
    for pattern in (f"rows.{suffix}", "*"):
        with pytest.raises(UserError, match=rf"rows.{suffix}: .* files are not read; convert it to \*.jsonl"):
            list_files([pattern])
    assert list_files(["*.txt"]) == [Path("a.txt")]


def test_a_pipe_is_named():
    os.mkfifo("pipe")
    Path("folder").mkdir()
    for pattern in ("pipe", "[fp]*"):
        with pytest.raises(UserError, match=r"matches no regular file \(found \w+\)"):
            list_files([pattern])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused(name, encoding):
    Path(name).write_bytes('{"text": "Wörter und words"}\n'.encode(encoding) * 500)
    with pytest.raises(UserError, match=f"^{name}: looks like UTF-16; convert it: iconv"):
        read(name)


def test_a_few_nul_bytes_are_text():
    Path("a.txt").write_text("some\0words\0")
    assert read("a.txt")[0] == [Document("some\0words\0")]


@pytest.mark.parametrize("name", ["gone.txt", "gone.jsonl", "folder"])
def test_an_unreadable_file_is_a_user_error(name):
    Path("folder").mkdir()
    with pytest.raises(UserError, match=f"cannot read {name}: "):
        read(name)


class FakeDistribution:
    def __init__(self, content):
        self.content = content

    def read_text(self, name):
        if isinstance(self.content, Exception):
            raise self.content
        return self.content if name == "METADATA" else None


def test_installed_readmes(monkeypatch):
    body = "word " * 50
    folded = "\n".join(
        ["first line"] + [f"        {line}" for line in [body, "  indented", body]] + [f"       |{body}"]
    )
    distributions = [
        FakeDistribution(f"Name: zeta\n\n# Zeta\n{body}"),
        FakeDistribution(f"Name: Alpha_B\nDescription: {folded}\nVersion: 1\n\n"),
        FakeDistribution(f"Name: alpha.b\n\nshadowed {body}"),
        FakeDistribution(f"Name: same\n\n# Zeta\n{body}"),
        FakeDistribution("Name: short\n\nUNKNOWN"),
        FakeDistribution(f"Name: bloomft\n\n{body}"),
        FakeDistribution(None),
        FakeDistribution(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
    ]
    monkeypatch.setattr(documents.importlib.metadata, "distributions", lambda: distributions)
    found, report = read(INSTALLED_READMES)
    alpha = f"first line\n{body}\n  indented\n{body}\n{body}"
    assert [document.text for document in found] == [alpha, f"# Zeta\n{body}"]
    assert report == ReadReport(files=2, documents=2)


def test_the_readmes_of_this_environment_are_real_text():
    found, report = read(INSTALLED_READMES)
    texts = [document.text for document in found]
    assert report.documents == len(texts) >= 10
    assert len(set(texts)) == len(texts)
    assert any("NumPy" in text for text in texts)
    assert texts == documents.installed_readmes()
