"""Files to documents: globs, plain text, JSON lines, and the long descriptions of installed distributions.

Documents are yielded one by one, so memory is bounded by the largest document and not by the corpus.
"""

import codecs
import glob
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from bloomft.errors import UserError

INSTALLED_READMES = "builtin:installed-readmes"
MIN_README_CHARACTERS = 200
MAX_README_CHARACTERS = 8000  # what follows in a longer one is its change log as a rule
# Read as raw text, these would teach the model their file format.
NOT_TEXT = (".csv", ".tsv", ".json", ".ndjson", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")

_ROW_FORMS = 'expected {"text": "..."} or {"prompt": "...", "response": "..."}'


@dataclass(frozen=True)
class Document:
    """One training text; ``prompt`` comes before it, is read by the model and is never a label."""

    text: str
    prompt: str = ""


@dataclass
class ReadReport:
    """Counts of files opened, documents yielded, and documents skipped, by reason."""

    files: int = 0
    documents: int = 0
    skipped_encoding: int = 0
    skipped_empty: int = 0

    def describe(self) -> str:
        """The counts as one phrase, for a log line or an error."""
        return (
            f"{self.documents:,} documents in {self.files:,} files "
            f"(skipped: {self.skipped_encoding:,} with invalid UTF-8, {self.skipped_empty:,} empty)"
        )


def list_files(patterns: Sequence[str]) -> list[Path]:
    """The files that the glob patterns name, sorted, each file once.

    ``~`` and ``**`` are understood; relative patterns start at the current directory. The pattern
    `INSTALLED_READMES` is in the result as it is. Raises `UserError` for a pattern that names no file
    and for a file whose suffix is in `NOT_TEXT`.
    """
    if not patterns:
        raise UserError("data.filenames is empty: name at least one file or pattern")
    found: dict[str, str] = {}
    for pattern in patterns:
        if pattern == INSTALLED_READMES:
            found[pattern] = pattern
            continue
        expanded = os.path.expanduser(pattern)
        # A file whose own name has brackets in it is meant literally.
        matches = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            why = "matches no file"
            if matches:
                folders = all(map(os.path.isdir, matches))
                why = "matches folders only" if folders else f"matches no regular file (found {matches[0]})"
            raise UserError(
                f"data.filenames: {pattern!r} {why} (searched from {os.getcwd()}); "
                "set it to your own texts, e.g. data.filenames='texts/**/*.md'"
            )
        for file in sorted(files):
            if file.lower().endswith(NOT_TEXT):
                raise UserError(
                    f"data.filenames: {file}: {Path(file).suffix} files are not read; convert it to *.jsonl "
                    'with one {"text": "..."} a line, or name patterns without it'
                )
            found.setdefault(os.path.realpath(file), file)
    return sorted(Path(file) for file in found.values())


def read_documents(files: Sequence[Path], report: ReadReport) -> Iterator[Document]:
    """Yield the documents of ``files`` in order and count into ``report`` what was read and skipped.

    A ``*.jsonl`` file holds one JSON object a line, with ``text``, or with ``prompt`` and ``response`` (other
    keys are ignored); any other file is one document. Invalid UTF-8 (of a JSONL file: that line) and
    documents of whitespace only are skipped and counted. Raises `UserError` for an unreadable file, for
    UTF-16 and, with its line, for a wrong JSONL row.
    """
    for file in files:
        try:
            for document in _read_file(file, report):
                if document is None:
                    report.skipped_encoding += 1
                elif not document.text.strip():
                    report.skipped_empty += 1
                else:
                    report.documents += 1
                    yield document
        except OSError as error:
            raise UserError(
                f"cannot read {file}: {error.strerror or error}; correct it or leave it out"
            ) from error


def is_jsonl(file: Path) -> bool:
    """Whether ``file`` is read as JSON lines: by its suffix alone."""
    return file.suffix.lower() == ".jsonl"


def installed_readmes() -> list[str]:
    """Long descriptions of the Python distributions installed here, sorted by name, without duplicates.

    Texts under `MIN_README_CHARACTERS` are left out, and so is this package's own, which quotes results of
    training on the others. Of a text over `MAX_README_CHARACTERS` only the beginning is returned.
    """
    texts: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        try:
            metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
        except (OSError, UnicodeDecodeError):
            continue
        message = HeaderParser().parsestr(metadata or "")
        name = re.sub(r"[-_.]+", "-", message.get("Name", "")).lower()
        text = str(message.get_payload())  # text already, since only the headers are parsed
        if not text.strip():
            # Older metadata folds the text into a header: further lines start with 8 spaces, or 7 and a bar.
            text = re.sub(r"^(?: {7}\|| {8})", "", message.get("Description", ""), flags=re.MULTILINE)
        if name and name != "bloomft" and len(text.strip()) >= MIN_README_CHARACTERS:
            # The first distribution of a name is the one that an import finds.
            texts.setdefault(name, text[:MAX_README_CHARACTERS])
    return list(dict.fromkeys(texts[name] for name in sorted(texts)))


def _read_file(file: Path, report: ReadReport) -> Iterator[Document | None]:
    """Documents of one file; None for one that is not UTF-8."""
    if str(file) == INSTALLED_READMES:
        for text in installed_readmes():
            report.files += 1
            yield Document(text) if _encodable(text) else None
        return
    if is_jsonl(file):
        with open(file, "rb") as lines:
            _refuse_utf16(lines.peek(4096)[:4096], file)
            report.files += 1
            for number, line in enumerate(lines, start=1):
                row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if row.strip():
                    yield _parse_row(row, f"{file}:{number}")
        return
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    _refuse_utf16(data[:4096], file)
    report.files += 1
    try:
        text = data.decode()
    except UnicodeDecodeError:
        yield None
        return
    del data
    yield Document(text)


def _refuse_utf16(start: bytes, file: Path) -> None:
    """Raise `UserError` if a file starts like UTF-16, whose Latin letters are valid UTF-8 with a NUL each."""
    marked = len(start) % 2 == 0 and start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked:
        try:
            codecs.getincrementaldecoder("utf-16")().decode(start)
        except UnicodeDecodeError:
            marked = False
    if marked or start.count(0) > len(start) // 3:
        raise UserError(f"{file}: looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file}")


def _parse_row(line: bytes, where: str) -> Document | None:
    """One JSONL row, or None where it is not UTF-8. ``where`` is file:line, for the `UserError`."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); {_ROW_FORMS}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that cannot be read ({error}); {_ROW_FORMS}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} and not an object; {_ROW_FORMS}")
    keys = {"text", "prompt", "response"} & row.keys()
    if keys not in ({"text"}, {"prompt", "response"}):
        raise UserError(f"{where}: keys are {', '.join(map(repr, row)) or 'none'}; {_ROW_FORMS}")
    for key in sorted(keys):
        if not isinstance(row[key], str):
            raise UserError(f"{where}: {key!r} is {json.dumps(row[key])[:40]} and not a string; {_ROW_FORMS}")
    document = Document(row["text"]) if "text" in row else Document(row["response"], prompt=row["prompt"])
    # A JSON escape can be half of a surrogate pair, which UTF-8 cannot encode.
    if b"\\u" in line and not _encodable(document.text + document.prompt):
        return None
    return document


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
