"""Write files so that a crash or a full disk never leaves a half-written one under its name."""

import contextlib
import ctypes
import fcntl
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from bloomft.errors import UserError

_TEMPORARY = re.compile(r"\.(?P<name>.+)-[0-9a-f]{8}")
_MARK = "[0-9a-f]" * 8  # of a folder that is written aside, as a glob pattern


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` beside ``path``, sync it to the disk, then rename it into place.

    Raises `UserError` if the folder cannot be written or the disk is full; ``path`` is then unchanged.
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


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless ``folder``, or the nearest folder above it that exists, can be written."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be a folder: {error.strerror}") from error
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{folder}: cannot be written: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: no permission to write into {nearest}")


def remove_unfinished(folder: Path, names: re.Pattern[str]) -> None:
    """Remove what killed `write_atomically` calls left in ``folder`` for files whose names match ``names``.

    The caller makes sure that no other process writes such a file at the same time.
    """
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and names.fullmatch(found["name"]) and path.is_file():
            path.unlink(missing_ok=True)


def lock_file(file: BinaryIO, *, wait: bool, shared: bool = False) -> bool | None:
    """Lock an open file until it is closed; False if another process holds it, None without lock support.

    A ``shared`` lock excludes only those that are not. The lock is the kernel's (flock): it ends with the
    process that holds it, however that ends. Containers on one host share it, and so do the clients of one
    NFS server unless they mount it with ``local_lock``.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Keep others from removing the folder that ``path`` marks, see `bloomft.cache`, where it is a file."""
    with contextlib.ExitStack() as stack:
        with suppress(OSError):
            lock_file(stack.enter_context(path.open("rb")), wait=False, shared=True)
        yield


def mark_used(path: Path) -> None:
    """Make now the time of ``path``, where that can be written."""
    with suppress(OSError):
        os.utime(path)


class AppendedFile:
    """A file whose appends are all or nothing, even on a full disk.

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
            with suppress(OSError):  # a device cannot be truncated
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
    """A scratch folder next to ``folder`` that replaces it, synced, when the block ends without an error.

    The two are exchanged atomically where the file system can do that, so that ``folder`` is the old one or
    the new one whenever the process is killed; the old one is then removed. A symbolic link is followed. What
    killed processes left behind is restored or removed first. Raises `UserError` where it cannot be written;
    ``folder`` is then unchanged.
    """
    target = Path(os.path.realpath(folder))
    try:
        make_folder(target.parent)
        _clear_leftovers(target)
        scratch, lock = _locked_scratch(target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    retired = _beside(target, "old", scratch.name[-8:])
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(scratch)
        _swap(scratch, target, retired)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written: {reason}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)
        os.close(lock)


def _beside(folder: Path, kind: str, mark: str) -> Path:
    return folder.with_name(f".{folder.name}-{kind}-{mark}")


def _locked_scratch(folder: Path) -> tuple[Path, int]:
    """A new folder next to ``folder``, and the lock that keeps others from taking it for a leftover."""
    while True:
        scratch = _beside(folder, "new", secrets.token_hex(4))
        scratch.mkdir()
        # Another process may take it for a leftover before it is locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(scratch, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if scratch.exists():
                return scratch, lock
            os.close(lock)


def _clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left next to ``folder``; an old one without a successor is restored."""
    name = glob.escape(folder.name)
    for leftover in sorted(folder.parent.glob(f".{name}-old-{_MARK}")):
        if not folder.exists():
            os.rename(leftover, folder)
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in folder.parent.glob(f".{name}-new-{_MARK}"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _swap(scratch: Path, folder: Path, retired: Path) -> None:
    """Give ``scratch`` the name ``folder``; what was there is at ``scratch`` or ``retired`` afterwards."""
    if not folder.exists():
        os.rename(scratch, folder)
    elif not _exchange(scratch, folder):
        os.rename(folder, retired)
        try:
            os.rename(scratch, folder)
        except BaseException:
            os.rename(retired, folder)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = os.fsencode(first), os.fsencode(second)
    return libc.renameat2(current_folder, paths[0], current_folder, paths[1], exchange) == 0


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
