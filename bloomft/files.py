"""Write files so that a crash or a full disk never leaves a half-written one under its name."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bloomft.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
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
