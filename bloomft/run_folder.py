"""A run's folder: one process at a time, nothing left of killed ones, and the checkpoint to go on from."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bloomft.checkpoint import LAST, DamagedCheckpointError, TrainingState, find_checkpoint, load_checkpoint
from bloomft.config import Config
from bloomft.errors import UserError
from bloomft.files import lock_file, make_folder, remove_unfinished
from bloomft.run_log import RUN_FILES

LOCK = "run.lock"
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")
_WRITTEN_HERE = re.compile("|".join([re.escape(LAST), _STEP_FILE.pattern, *map(re.escape, RUN_FILES)]))


@dataclass
class Resumption:
    """Where a run goes on: a checkpoint and what it holds, both None at the start; ``notes`` say how it was
    found, where that is not the usual way."""

    path: Path | None
    state: TrainingState | None
    notes: list[str]


@contextlib.contextmanager
def exclusive_folder(folder: Path, *, anew: bool) -> Iterator[list[str]]:
    """Make ``folder`` and hold it for this process alone; yields lines for the log.

    With ``anew`` an earlier run in it moves aside whole, to ``<folder>.1`` or the next free number. What
    killed processes left unfinished is removed. Raises `UserError` if another process holds the folder,
    naming it, or if it cannot be written.
    """
    with contextlib.ExitStack() as locks:
        notes = locks.enter_context(_held(folder))
        if anew and _checkpoints(folder):
            taken = (folder.with_name(f"{folder.name}.{n}") for n in range(1, 10**6))
            try:
                folder.rename(next(path for path in taken if not path.exists()))
            except OSError as error:
                raise UserError(f"{folder}: cannot be moved aside: {error.strerror}") from error
            notes = locks.enter_context(_held(folder))
        if not notes:
            remove_unfinished(folder, _WRITTEN_HERE)
        yield notes


def find_resumption(config: Config) -> Resumption:
    """The checkpoint that ``train.resume`` asks for, read.

    "auto" is last.ckpt; if that is damaged or missing, the whole step-<n>.ckpt with the largest n. Raises
    `UserError` if there are checkpoints but none that can be used, or if it holds more steps than configured.
    """
    folder, resume = Path(config.train.output_dir), config.train.resume
    if resume == "never":
        return Resumption(None, None, [])
    candidates = _checkpoints(folder) if resume == "auto" else [find_checkpoint(resume, folder)]
    notes = []
    if resume == "auto" and candidates and candidates[0].name != LAST:
        notes.append(f"{folder / LAST} is missing")
    for path in candidates:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as error:
            notes.append(str(error))
            continue
        total = config.optim.scheduler.num_training_steps
        if state.step > total:
            raise UserError(
                f"optim.scheduler.num_training_steps is {total}, but {path} holds step {state.step}; "
                "raise it, or start anew with train.resume=never"
            )
        return Resumption(path, state, notes)
    if notes:
        raise UserError(f"{notes[0]}; train.resume=never starts anew" if resume == "auto" else notes[0])
    return Resumption(None, None, [])


def _checkpoints(folder: Path) -> list[Path]:
    """last.ckpt, then the step files from the latest to the first."""
    steps = [(int(found[1]), path) for path in folder.iterdir() if (found := _STEP_FILE.fullmatch(path.name))]
    last = folder / LAST
    return [last] * last.exists() + [path for _, path in sorted(steps, reverse=True)]


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
                f"{folder}: {other} trains there now; wait for its end, or choose another train.output_dir"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield [] if held else [f"{path}: this file system has no locks; start no second process here"]
