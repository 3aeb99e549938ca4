"""List what bloomft has cached, or remove it: ``python -m bloomft.cache [FOLDER] [--prune AGE]``.

Tokens of a corpus under one tokenizer, and the embedded base. Whatever is removed is made again when needed.
"""

import contextlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomft.command_line import CommandParser, run_command
from bloomft.config.keys import default_cache_dir
from bloomft.data.token_cache import META
from bloomft.errors import UserError
from bloomft.files import lock_file

# What a cached folder is called, and the file in it whose lock and time say that it is used, and when.
_KINDS = {re.compile(r"tokens-[0-9a-f]{32}"): META, re.compile(r"tiny-base-[0-9a-f]{16}"): "config.json"}
_REMOVED = ".removed-"
_UNITS = {"m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class CachedFolder:
    """A folder of the cache: the file that marks its use, bytes, time of the last use, counts of tokens."""

    path: Path
    mark: Path
    size: int
    last_used: float
    documents: int | None
    tokens: int | None

    @property
    def name(self) -> str:
        """Enough of its name to tell it from others."""
        kind, _, key = self.path.name.rpartition("-")
        return f"{kind}-{key[:8]}"

    def remove(self) -> bool:
        """Remove it unless a process uses it, or the file system has no locks that would say so."""
        with self.mark.open("rb") as mark:
            if lock_file(mark, wait=False) is not True:
                return False
            # renamed first: nobody may find half of it under its name
            hidden = self.path.with_name(f"{_REMOVED}{secrets.token_hex(8)}")
            self.path.rename(hidden)
            shutil.rmtree(hidden)
        self.path.with_suffix(".lock").unlink(missing_ok=True)
        return True


def cached_folders(cache_dir: Path) -> list[CachedFolder]:
    """What ``cache_dir`` holds, the last used first."""
    found = []
    for path in cache_dir.iterdir() if cache_dir.is_dir() else ():
        for name, mark in _KINDS.items():
            if name.fullmatch(path.name) and (path / mark).is_file():
                found.append(_describe(path, path / mark))
    return sorted(found, key=lambda folder: folder.last_used, reverse=True)


def _describe(path: Path, mark: Path) -> CachedFolder:
    about: dict[str, Any] = {}
    if mark.name == META:
        # a damaged one is listed, and removed, like the others
        with contextlib.suppress(OSError, ValueError):
            about = json.loads(mark.read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return CachedFolder(
        path, mark, size, mark.stat().st_mtime, about.get("num_documents"), about.get("num_tokens")
    )


def _prune(cache_dir: Path, folders: Sequence[CachedFolder], seconds: float) -> None:
    for leftover in cache_dir.glob(f"{_REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    old = [folder for folder in folders if time.time() - folder.last_used >= seconds]
    freed = 0
    for folder in old:
        try:
            removed = folder.remove()
        except OSError as error:
            raise UserError(f"{folder.path}: cannot be removed: {error.strerror}") from error
        freed += folder.size if removed else 0
        print(f"{'removed' if removed else 'kept, in use:'} {folder.name}  {_megabytes(folder.size)}")
    print(f"{_megabytes(freed)} removed, {len(folders) - len(old)} younger left")


def _age(text: str) -> float:
    """Seconds of an age such as 30d, 12h or 45m; 0 for "all"."""
    if text == "all":
        return 0
    if not (found := re.fullmatch(r"(\d{1,6})([mhd])", text)):
        raise UserError(f"--prune {text!r:.80}: expected all, or an age such as 30d, 12h or 45m")
    return int(found[1]) * _UNITS[found[2]]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


_ABOUT = """List what is cached: the tokens of each corpus under each tokenizer, and the
embedded base. With --prune remove it, except what a process uses; it is made
again when it is needed."""
_EXAMPLES = {
    "": "what there is",
    "--prune 30d": "remove what was not used for thirty days",
    "/data/cache --prune all": "remove everything from another data.cache_dir",
}


def main(arguments: Sequence[str]) -> None:
    """The command: [FOLDER] [--prune AGE]."""
    parser = CommandParser("cache", "[FOLDER] [--prune AGE]", _ABOUT, _EXAMPLES)
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, help="default: $XDG_CACHE_HOME/bloomft"
    )
    parser.add_argument("--prune", metavar="AGE", help="what was not used for 45m, 12h, 30d; or all")
    options = parser.parse_args(arguments)
    cache_dir = (options.folder or default_cache_dir()).expanduser()
    seconds = None if options.prune is None else _age(options.prune)
    folders = cached_folders(cache_dir)
    if seconds is not None:
        _prune(cache_dir, folders, seconds)
        return
    if folders:
        print(f"{'':20}{'size':>12}{'documents':>12}{'tokens':>16}  last used")
    for folder in folders:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.last_used))
        counts = f"{_count(folder.documents):>12}{_count(folder.tokens):>16}"
        print(f"{folder.name:20}{_megabytes(folder.size):>12}{counts}  {used}")
    print(f"{len(folders)} in {cache_dir}, {_megabytes(sum(folder.size for folder in folders))}")


if __name__ == "__main__":
    run_command(main)
