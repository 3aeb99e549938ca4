"""A run's folder: used by one process at a time, without leftovers of killed ones."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from bloomft.errors import UserError
from bloomft.files import lock_file, make_folder, remove_unfinished
from bloomft.run.checkpoint import LAST, STEP_FILE, list_checkpoints
from bloomft.run.log import RUN_FILES

LOCK = "run.lock"
_WRITTEN_HERE = re.compile("|".join([re.escape(LAST), STEP_FILE.pattern, *map(re.escape, RUN_FILES)]))


@contextlib.contextmanager
def exclusive_folder(folder: Path, *, fresh: bool) -> Iterator[list[str]]:
    """Create ``folder`` and lock it for this process; yields lines for the log.

    With ``fresh`` an earlier run in it is moved as a whole, to ``<folder>.1`` or the next free number. What
    killed processes left unfinished is removed. Raises `UserError` if another process holds the folder,
    naming it, or if it cannot be written.
    """
    with contextlib.ExitStack() as locks:
        notes = locks.enter_context(_held(folder))
        if fresh and list_checkpoints(folder):
            taken = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 10**6))
            try:
                folder.rename(next(path for path in taken if not path.exists()))
            except OSError as error:
                raise UserError(f"{folder}: cannot be moved aside: {error.strerror}") from error
            notes = locks.enter_context(_held(folder))
        if not notes:
            remove_unfinished(folder, _WRITTEN_HERE)
        yield notes


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[list[str]]:
    """Hold the lock of ``folder``, whose file stays when it is released; yields lines for the log."""
    make_folder(folder)
    path = folder / LOCK
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    with file:
        held = lock_file(file, wait=False)
        if held is False:
            file.seek(0)
            other = file.read(200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{folder}: {other} is training there; wait until it ends, or choose another train.output_dir"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield [] if held else [f"{path}: this file system has no locks; start no second process here"]
