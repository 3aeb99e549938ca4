"""One run folder, one process."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from bloomft.errors import UserError
from bloomft.run.folder import LOCK, exclusive_folder


def hold(folder: Path, ready) -> None:
    with exclusive_folder(folder, fresh=False):
        ready.set()
        signal.pause()


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(run, settings):
    settings["optim"]["scheduler"]["num_training_steps"] = 2
    folder = Path(settings["train"]["output_dir"])
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(folder, ready), daemon=True)
    other.start()
    assert ready.wait(timeout=30)
    leftover = folder / ".last.ckpt-01234567"
    leftover.write_bytes(b"being written")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=rf"run: process {other.pid} on \S+ is training there; wait"):
            run(train__resume=resume)
    # Not even a leftover is touched while another holds the folder.
    assert sorted(path.name for path in folder.iterdir()) == [leftover.name, LOCK]
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert run().step == 2
    assert not leftover.exists()


def test_an_earlier_run_moves_aside_and_the_new_folder_is_held_too(run):
    folder = run(optim__scheduler__num_training_steps=2).run_dir
    (folder / "last.ckpt").unlink()  # its step file alone makes it a run to keep
    with exclusive_folder(folder, fresh=True):
        assert (folder.with_name("run.1") / "step-2.ckpt").exists()
        for held in (folder, folder.with_name("run.1")):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is training there"):
                exclusive_folder(held, fresh=False).__enter__()
    with exclusive_folder(folder, fresh=False) as notes:
        assert notes == []


def test_without_locks_the_run_says_so(tmp_path, no_locks):
    leftover = tmp_path / ".last.ckpt-01234567"
    leftover.write_bytes(b"perhaps being written")
    with exclusive_folder(tmp_path, fresh=False) as notes:
        assert notes == [f"{tmp_path / LOCK}: this file system has no locks; start no second process here"]
    assert leftover.exists()


def test_leftovers_of_killed_writes_go_at_the_next_start(short_run):
    folder = short_run().run_dir
    names = ("last.ckpt", "step-4.ckpt", "metrics.jsonl", "config.yaml", "wandb-id")
    ours = [folder / f".{name}-0123abcd" for name in names]
    foreign = [folder / name for name in (".mine-0123abcd", ".last.ckpt-0123abcd.txt", "last.ckpt-0123abcd")]
    for path in (*ours, *foreign):
        path.write_bytes(b"half")
    short_run()
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in foreign)
