"""Write files so that a crash or a full disk never leaves a half-written one under its name."""

import os
import tempfile
from pathlib import Path

from bloomft.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, sync it to the disk, then rename it into place.

    Raises `UserError` if the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


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
