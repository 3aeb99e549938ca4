"""Documents to tokens on disk: tokenized once, in bounded memory, read back through a memory map.

One folder ``tokens-<key>`` holds one corpus under one tokenizer, and the key is a hash of both, so nothing
ever has to be invalidated: other content or another tokenizer is another folder.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bloomft.data.documents import (
    INSTALLED_READMES,
    Document,
    ReadReport,
    installed_readmes,
    is_jsonl,
    list_files,
    read_documents,
)
from bloomft.data.text_pieces import added_tokens_for_cutting, cut_text
from bloomft.errors import UserError
from bloomft.files import lock_file, mark_used, sync_folder
from bloomft.progress import say, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT_VERSION = 2
# Least length of a piece, where a text may be cut. The pieces of a batch are encoded in parallel, and an
# encoding takes some hundred bytes per token.
PIECE_CHARACTERS = 1 << 13
BATCH_CHARACTERS = 1 << 19
READ_BYTES = 1 << 20

META = "meta.json"


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Tokenized documents, each of them prompt tokens, text tokens, one end-of-text token.

    tokens: [num_tokens] uint16 or uint32, all documents one after another; offsets: [num_documents + 1]
    int64, where each begins and the last ends; prompt_lengths: [num_documents] int64, how many of a
    document's tokens are prompt; report: what reading the files found; key: hash of the content and
    the tokenizer that made it. The arrays are read-only memory maps when they come from `build_token_cache`;
    its files are then marked as in use, by a lock on meta.json, as long as the object lives.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    report: ReadReport
    key: str = ""

    @property
    def num_documents(self) -> int:
        """Documents in the cache."""
        return len(self.prompt_lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their ends of text included."""
        return int(self.offsets[-1])

    def document(self, index: int) -> tuple[np.ndarray, int]:
        """Tokens [n] of document ``index`` as a view, and how many of them are its prompt."""
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return tokens, int(self.prompt_lengths[index])

    def contents(self) -> np.ndarray:
        """Numbers [num_documents] int64 from 0, equal where documents have the same tokens."""
        numbers: dict[bytes, int] = {}
        result = np.empty(self.num_documents, np.int64)
        for index in range(self.num_documents):
            digest = hashlib.blake2b(self.document(index)[0].data, digest_size=16).digest()
            result[index] = numbers.setdefault(digest, len(numbers))
        return result


def open_token_cache(cache_dir: Path, key: str) -> TokenCache | None:
    """The cache of ``key``, which another process has built; None where it is not there, or damaged."""
    return _open_cache(_folder(cache_dir, key))


def build_token_cache(
    patterns: Sequence[str], tokenizer: "PreTrainedTokenizerFast", cache_dir: Path, *, progress: bool = True
) -> TokenCache:
    """The tokens of every document that ``patterns`` name, from the cache or tokenized into it now.

    ``tokenizer`` must be a fast one with an end-of-text token; nothing in it is changed. A folder appears
    under its final name only when it is complete and synced, a damaged one is rebuilt, and of several
    processes that need the same one the first builds it. ``progress`` adds two lines to what a wait shows.

    Raises `UserError` for what the files hold (see `read_documents`), a file that changes meanwhile, a corpus
    without any document, an unsuitable tokenizer, and a folder that cannot be written.
    """
    files = list_files(patterns)
    state = _tokenizer_state(tokenizer)
    before = _file_states(files)
    total = sum(sum(map(len, s)) if isinstance(s, list) else s[1] for s in before)
    with waiting("reading the text,", total, in_bytes=True) as wait:
        key = _content_key(files, state, wait.advance)
    folder = _folder(cache_dir, key)
    cache = _open_cache(folder)
    if cache is not None:
        return cache
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        with _exclusive(folder.with_suffix(".lock"), progress):
            cache = _open_cache(folder)
            if cache is not None:
                return cache
            partial = _new_folder(folder)
            try:
                _write_cache(partial, files, total, state, progress)
                if _file_states(files) != before:
                    raise UserError("a file of data.filenames changed while it was read; start again")
                return _publish(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {folder}: {error.strerror or error}; "
            "free space there or point data.cache_dir at a folder that can be written"
        ) from error


def _folder(cache_dir: Path, key: str) -> Path:
    return Path(cache_dir).expanduser() / f"tokens-{key}"


class _TokenizerState(NamedTuple):
    """Everything in a tokenizer that determines tokens."""

    json: str  # canonical, without the padding and truncation that calls leave set
    eos: int
    splits_special_tokens: bool

    def backend(self) -> Tokenizer:
        """A separate copy: the caller's tokenizer may pad or truncate and stays unchanged."""
        backend = Tokenizer.from_str(self.json)
        backend.encode_special_tokens = self.splits_special_tokens
        return backend


def _tokenizer_state(tokenizer: "PreTrainedTokenizerFast") -> _TokenizerState:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"the tokenizer is a {type(tokenizer).__name__} without a Rust backend; "
            "use a model folder with a tokenizer.json (a fast tokenizer)"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token to end a document with; name one in its tokenizer_config.json"
        )
    try:
        state = json.loads(backend.to_str())
    except Exception as error:  # tokenizers raises no narrower class, for parts that are Python code
        raise UserError(f"the tokenizer cannot be written as a tokenizer.json: {error}") from error
    if dropout := state["model"].get("dropout"):
        raise UserError(f"the tokenizer's tokens are random: its model has dropout {dropout}; set it to null")
    state["truncation"] = state["padding"] = None
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    return _TokenizerState(json.dumps(state, sort_keys=True), int(tokenizer.eos_token_id), splits)


def _file_states(files: Sequence[Path]) -> list[Any]:
    """What changes when a file is written to: identity, size, time; of the installed READMEs their text."""
    states: list[Any] = []
    for file in files:
        if str(file) == INSTALLED_READMES:
            states.append(installed_readmes())
            continue
        status = _status(file)
        states.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return states


def _status(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; repair it or leave it out") from error


def _content_key(files: Sequence[Path], tokenizer: _TokenizerState, advance: Callable[[int], None]) -> str:
    """Hash of what determines the tokens: format, tokenizer, and each file's content and kind, in order."""
    key = hashlib.blake2b(digest_size=16)
    numbers = [
        FORMAT_VERSION,
        tokenizer.eos,
        int(tokenizer.splits_special_tokens),
        len(tokenizer.json),
        len(files),
    ]
    key.update(f"{' '.join(map(str, numbers))}\n{tokenizer.json}".encode())
    for file in files:
        content = hashlib.blake2b()
        if str(file) == INSTALLED_READMES:
            kind = "readmes"
            content.update(json.dumps(installed_readmes()).encode())
        else:
            kind = "jsonl" if is_jsonl(file) else "text"
            try:
                with open(file, "rb") as source:
                    while data := source.read(READ_BYTES):
                        content.update(data)
                        advance(len(data))
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}; repair it or leave it out") from error
        key.update(f"{kind} {content.hexdigest()}\n".encode())
    return key.hexdigest()


def _new_folder(folder: Path) -> Path:
    """An empty sibling of ``folder``, with the permissions that the user's umask gives."""
    partial = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(8)}")
    partial.mkdir()
    return partial


@contextlib.contextmanager
def _exclusive(path: Path, progress: bool) -> Iterator[None]:
    """Hold the lock file ``path``; without lock support go on: the work may be done twice, never wrong."""
    with open(path, "ab") as lock:
        if lock_file(lock, wait=False) is False:
            if progress:
                say("another process tokenizes the same text; waiting for it")
            with waiting("waiting for another process"):
                lock_file(lock, wait=True)
        yield


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove what killed builds left: unfinished folders whose lock nobody holds."""
    for leftover in cache_dir.glob("tokens-*.partial-*"):
        with open(cache_dir / f"{leftover.name.partition('.')[0]}.lock", "ab") as lock:
            if lock_file(lock, wait=False):
                shutil.rmtree(leftover, ignore_errors=True)


class _CacheWriter:
    """Streams documents into the files of a cache folder; what `write` has written leaves memory."""

    def __init__(self, folder: Path, dtype: np.dtype, eos: int) -> None:
        self._eos = eos
        self.num_tokens = self.num_documents = 0
        self._prompt_length = 0
        self._held_back = 0
        self._dtypes = {"tokens": dtype, "offsets": np.dtype(np.int64), "prompt_lengths": np.dtype(np.int64)}
        self._pending: dict[str, list[int]] = {"tokens": [], "offsets": [0], "prompt_lengths": []}
        self._checksums = dict.fromkeys(self._dtypes, 0)
        self._stack = contextlib.ExitStack()
        self._files = {
            name: self._stack.enter_context((folder / f"{name}.bin").open("wb")) for name in self._dtypes
        }

    def add_prompt(self, ids: Sequence[int]) -> None:
        """Append prompt tokens to the current document."""
        self._add(ids)
        self._prompt_length += len(ids)

    def add_text(self, ids: Sequence[int]) -> None:
        """Append text tokens to the current document; ends of text wait until others follow."""
        kept = len(ids)
        while kept and ids[kept - 1] == self._eos:
            kept -= 1
        if kept:
            self._add([self._eos] * self._held_back)
            self._add(ids[:kept])
            self._held_back = 0
        self._held_back += len(ids) - kept

    def end_document(self) -> None:
        """Close the current document with one end of text, whether or not its own text ends with one."""
        self._add([self._eos])
        self._held_back = 0
        self._pending["offsets"].append(self.num_tokens)
        self._pending["prompt_lengths"].append(self._prompt_length)
        self._prompt_length = 0
        self.num_documents += 1

    def _add(self, ids: Sequence[int]) -> None:
        self._pending["tokens"].extend(ids)
        self.num_tokens += len(ids)

    def write(self) -> None:
        """Write what was added to the files."""
        for name, values in self._pending.items():
            data = np.array(values, dtype=self._dtypes[name]).tobytes()
            self._checksums[name] = zlib.crc32(data, self._checksums[name])
            self._files[name].write(data)
            values.clear()

    def finish(self) -> dict[str, Any]:
        """Write, sync and close the files; returns what a reader checks them against."""
        self.write()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        return {
            "dtype": self._dtypes["tokens"].name,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "crc32": self._checksums,
        }

    def close(self) -> None:
        """Close the files, complete or not."""
        self._stack.close()


def _write_cache(
    folder: Path, files: Sequence[Path], total: int, tokenizer: _TokenizerState, progress: bool
) -> None:
    """Tokenize ``files``, ``total`` bytes, into ``folder``, the metadata last."""
    backend = tokenizer.backend()
    highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    dtype = np.dtype(np.uint16 if max(highest, tokenizer.eos) <= np.iinfo(np.uint16).max else np.uint32)
    report = ReadReport()
    started = time.perf_counter()
    if progress:
        say(f"tokenizing {len(files):,} files, {total / 1e6:,.1f} MB")
    with (
        waiting("tokenizing", total, in_bytes=True) as wait,
        contextlib.closing(_CacheWriter(folder, dtype, tokenizer.eos)) as out,
    ):
        _tokenize(read_documents(files, report), backend, out, wait.advance)
        meta = out.finish()
    if not report.documents:
        raise UserError(f"data.filenames holds no text to train on: {report.describe()}; name other files")
    meta.update(version=FORMAT_VERSION, report=dataclasses.asdict(report))
    with open(folder / META, "w") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    if progress:
        seconds = time.perf_counter() - started
        rate = f"{meta['num_tokens']:,} tokens in {seconds:.1f} s"
        say(f"tokenized {report.documents:,} documents in {len(files):,} files: {rate}")


def _tokenize(
    documents: Iterable[Document],
    backend: Tokenizer,
    out: _CacheWriter,
    advance: Callable[[int], None],
) -> None:
    """Encode in batches of bounded size; the Rust backend spreads the pieces of a batch over its threads."""
    added_tokens = added_tokens_for_cutting(json.loads(backend.to_str()))
    batch: list[tuple[str, bool, bool]] = []
    characters = 0

    def flush() -> None:
        encodings = backend.encode_batch_fast([text for text, _, _ in batch], add_special_tokens=False)
        for (_, is_prompt, is_last), encoding in zip(batch, encodings, strict=True):
            (out.add_prompt if is_prompt else out.add_text)(encoding.ids)
            if is_last:
                out.end_document()
        out.write()
        advance(sum(len(text.encode()) for text, _, _ in batch))
        batch.clear()

    for document in documents:
        for piece in _pieces(document, added_tokens):
            batch.append(piece)
            characters += len(piece[0])
            if characters >= BATCH_CHARACTERS:
                flush()
                characters = 0
    if batch:
        flush()


def _pieces(document: Document, added_tokens: tuple[str, ...] | None) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it is prompt, whether it ends the document) in order."""

    def cut(text: str) -> Iterator[str]:
        if added_tokens is not None:
            yield from cut_text(text, PIECE_CHARACTERS, added_tokens)
        elif text:
            yield text

    for text in cut(document.prompt):
        yield text, True, False
    start = 0
    for text in cut(document.text):
        start += len(text)
        yield text, False, start == len(document.text)


def _open_cache(folder: Path) -> TokenCache | None:
    """The cache in ``folder``, or None where it is missing, of another format, truncated or damaged."""
    unreadable = (OSError, ValueError, KeyError, TypeError, RecursionError)
    with contextlib.ExitStack() as stack, contextlib.suppress(*unreadable):
        mark = stack.enter_context((folder / META).open("rb"))
        if lock_file(mark, wait=False, shared=True) is False:
            return None  # it is being removed
        cache = _read_cache(folder, json.load(mark))
        if cache is not None:
            weakref.finalize(cache, stack.pop_all().close)
            mark_used(folder / META)
        return cache
    return None


def _read_cache(folder: Path, meta: dict[str, Any]) -> TokenCache | None:
    if meta["version"] != FORMAT_VERSION:
        return None
    num_documents, num_tokens = meta["num_documents"], meta["num_tokens"]
    layout = {
        "tokens": (np.dtype(meta["dtype"]), num_tokens),
        "offsets": (np.dtype(np.int64), num_documents + 1),
        "prompt_lengths": (np.dtype(np.int64), num_documents),
    }
    arrays = {}
    for name, (dtype, length) in layout.items():
        path = folder / f"{name}.bin"
        if path.stat().st_size != length * dtype.itemsize:
            return None
        # As the plain base class: slicing an np.memmap costs several times as much.
        arrays[name] = np.memmap(path, dtype=dtype, mode="r", shape=(length,)).view(np.ndarray)
        if _checksum(path) != meta["crc32"][name]:
            return None
    # A folder that is about to be renamed has a suffix after its key.
    key = folder.name.removeprefix("tokens-").partition(".")[0]
    return TokenCache(**arrays, report=ReadReport(**meta["report"]), key=key)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, read in blocks: mapped pages would count as this process's memory."""
    value = 0
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            value = zlib.crc32(data, value)
    return value


def _publish(partial: Path, folder: Path) -> TokenCache:
    """Give the finished folder its name, unless another process has published an equal one by now."""
    # Opened before the renaming: a mapping outlives whatever happens to the name.
    ours = _open_cache(partial)
    if ours is None:
        raise OSError(errno.EIO, "what was written reads back differently")
    while True:
        try:
            os.rename(partial, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            sync_folder(folder.parent)
            return ours
        theirs = _open_cache(folder)
        if theirs is not None:
            return theirs
        damaged = _new_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, damaged / "damaged")
        shutil.rmtree(damaged, ignore_errors=True)
