"""Write files so that a crash or a full disk never leaves a half-written one under its name."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bloomft.errors import UserError

_TEMPORARY = re.compile(r"\.(?P<name>.+)-[0-9a-f]{8}")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` beside ``path``, sync it to the disk, then rename it into place.

    Raises `UserError` if the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def remove_unfinished(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what a killed `write_atomically` of a file in ``folder`` left, if ``names`` matches that file.

    The caller makes sure that no other process writes such a file meanwhile.
    """
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and names.fullmatch(found["name"]) and path.is_file():
            path.unlink(missing_ok=True)


def lock_file(file: BinaryIO, *, wait: bool) -> bool | None:
    """Lock an open file until it is closed; False where another holds it, None where locks do not exist.

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends. Containers
    on one host share it, and so do the clients of one NFS server unless they mount it with ``local_lock``.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


class AppendedFile:
    """A file that grows by whole pieces: one that the disk has no space for leaves nothing of itself.

    Raises `UserError` where it cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    def append(self, text: str) -> None:
        """Write ``text`` at the end, all of it or nothing."""
        start, rest = self._file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # a device cannot be cut
                self._file.truncate(start)
                self._file.seek(start)
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def sync(self) -> None:
        """Make everything written so far durable."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """A scratch folder beside ``folder`` that takes its name, synced, when the block ends without an error.

    What stood under that name is removed after the swap. Raises `UserError` where it cannot be written.
    """
    mark = secrets.token_hex(4)
    scratch, retired = (folder.with_name(f".{folder.name}-{kind}-{mark}") for kind in ("new", "old"))
    try:
        make_folder(folder.parent)
        scratch.mkdir()
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(scratch)
        if folder.exists():
            os.replace(folder, retired)
        os.replace(scratch, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents and make sure that it can be written; `UserError` otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write into this folder: {error.strerror}") from error
