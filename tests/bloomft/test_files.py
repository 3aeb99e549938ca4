"""A folder that is written aside is the old one or the new one, whatever happens and whenever."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bloomft import files
from bloomft.errors import UserError
from bloomft.files import AppendedFile, folder_written_aside

OLD, NEW = {"a": "old", "only-old": "old"}, {"a": "new", "b": "new"}


def content(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def fill(folder, texts: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def write_new(folder) -> None:
    with folder_written_aside(folder) as scratch:
        fill(scratch, NEW)


def write_and_kill(folder, lines: int) -> bool:
    """Write in a child process that is killed before its ``lines``-th line of files.py; whether it was."""
    child = os.fork()
    if child == 0:
        left = [lines]

        def trace(frame, event, _argument):
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            write_new(folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture(params=[True, False], ids=["exchange", "two_renames"])
def exchange(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


@pytest.mark.parametrize(
    ("exchange", "existing"), [(True, True), (False, True), (True, False)], indirect=["exchange"]
)
def test_killed_before_every_line(tmp_path, exchange, existing):
    outcomes = []
    for lines in range(1, 500):
        folder = tmp_path / str(lines) / "out"
        folder.parent.mkdir()
        if existing:
            fill(folder, OLD)
        killed = write_and_kill(folder, lines)
        beside = [content(path) for path in folder.parent.iterdir() if path.is_dir()]
        if existing:
            assert OLD in beside or NEW in beside
        if existing and exchange:
            assert content(folder) in (OLD, NEW)
        outcomes.append(folder.exists() and content(folder) == NEW)
        # the next one succeeds and leaves nothing else behind
        write_new(folder)
        assert content(folder) == NEW
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        if not killed:
            break
    assert not killed
    assert lines > 30
    assert outcomes == sorted(outcomes)
    assert outcomes[-1]


def test_a_kill_between_two_renames_is_undone_by_a_later_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    fill(tmp_path / ".out-old-00000000", OLD)
    fill(tmp_path / ".out-new-00000000", NEW)
    with pytest.raises(RuntimeError), folder_written_aside(tmp_path / "out"):
        raise RuntimeError
    assert content(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, exchange, monkeypatch, failing):
    fill(tmp_path / "out", OLD)
    rename, calls = os.rename, []

    def fail(*paths):
        calls.append(paths)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        rename(*paths)

    monkeypatch.setattr(os, "rename", fail)
    if exchange:
        write_new(tmp_path / "out")
        assert content(tmp_path / "out") == NEW
    else:
        with pytest.raises(UserError, match="out: cannot be written: Input/output error"):
            write_new(tmp_path / "out")
        assert content(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_full_disk_is_one_line_and_leaves_the_old_folder(tmp_path, error):
    fill(tmp_path / "out", OLD)

    def write_too_much():
        with folder_written_aside(tmp_path / "out") as scratch:
            fill(scratch, NEW)
            raise error

    with pytest.raises(UserError, match=r"out: cannot be written: .*No space left") as caught:
        write_too_much()
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_symbolic_link_stays_one(tmp_path, existing):
    (tmp_path / "disk").mkdir()
    if existing:
        fill(tmp_path / "disk" / "real", OLD)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    write_new(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk" / "real") == NEW
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_the_scratch_folder_of_a_living_process_stays(tmp_path):
    with folder_written_aside(tmp_path / "out") as scratch:
        write_new(tmp_path / "out")
        fill(tmp_path / "other[", NEW)
        write_new(tmp_path / "other[")
        assert scratch.is_dir()
        fill(scratch, OLD)
    assert content(tmp_path / "out") == OLD


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_full(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = AppendedFile(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        file.append("line\n")
    file.close()
