"""metrics.jsonl and the boards beside it: a crash or a full disk costs no line but its own."""

import json
import sys
import types
from pathlib import Path

import pytest

from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.files import AppendedFile
from bloomft.run.log import RunLog
from bloomft.train import train


@pytest.fixture
def log_at(settings, config_path):
    """A `RunLog` of a run that goes on from a step, with overrides of its configuration."""
    Path(settings["train"]["output_dir"]).mkdir()
    return lambda step, *overrides: RunLog(load_config(config_path(settings), overrides), step)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_damaged_line_costs_itself_alone(log_at):
    damaged = [b'{"step": 2, "lo', b"\0" * 40, b"", b"[2]", b"7", b'{"step": "2"}', b"\xff\xfe", b"[" * 10**5]
    with log_at(0) as log:
        for step in range(1, 7):
            log.record(step, loss=1.0 / step)
    path = log.folder / "metrics.jsonl"
    good = path.read_bytes().splitlines()
    lines = [line for pair in zip(good, [*damaged[:5], b""], strict=True) for line in pair] + damaged[5:]
    path.write_bytes(b"\n".join(lines))  # without a line's end, as after a crash
    with log_at(5):
        pass
    assert path.read_bytes() == b"".join(line + b"\n" for line in good[:5])
    assert f"{path}: unreadable lines removed: {len(damaged) + 1}\n" in (log.folder / "log").read_text()
    before = path.stat().st_ino
    with log_at(5):
        pass
    assert path.stat().st_ino == before, "a file without a fault is not written again"


def test_a_good_last_line_without_its_end_is_kept_and_ended(log_at):
    with log_at(0) as log:
        log.record(1, loss=1.0)
    path = log.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with log_at(1) as log:
        log.record(2, loss=0.5)
    assert steps(log.folder) == [1, 2]


def test_a_folder_in_the_place_of_a_file(log_at, tmp_path):
    for name in ("metrics.jsonl", "log"):
        (tmp_path / "run" / name).mkdir()
        with pytest.raises(UserError, match=rf"{name}: cannot be (read|written): Is a directory"):
            log_at(0)
        (tmp_path / "run" / name).rmdir()


def test_a_full_disk_leaves_no_half_line(log_at, monkeypatch):
    class Full:
        """The open file, on a disk with space for twenty more bytes."""

        def __init__(self, file):
            self.file, self.left = file, 20

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.left])
            self.left -= written
            return written

    with log_at(0) as log:
        log.record(1, loss=1.0)
        whole = log._metrics._file
        log._metrics._file = Full(whole)
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
            log.record(2, loss=0.5)
        assert steps(log.folder) == [1]
        log._metrics._file = whole
        log.record(2, loss=0.25)
    assert steps(log.folder) == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_full(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = AppendedFile(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        file.append("line\n")
    file.close()


def test_an_evaluation_has_a_bar_of_its_own_while_it_lasts(log_at):
    with log_at(0) as log:
        with log.evaluation() as progress:
            progress(3, 12)
            (task,) = [task for task in log._bar.tasks if task.description == "held-out row"]
            assert (task.completed, task.total) == (3, 12)
        assert [task.description for task in log._bar.tasks] == ["step"]


@pytest.fixture
def tensorboard(monkeypatch):
    """Stands in for TensorBoard's writer: what it was given, and from which step earlier lines are void."""
    writers = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            self.purge_step, self.lines, self.flushed = purge_step, [], 0
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.lines.append((name, step))

        def flush(self):
            self.flushed = len(self.lines)

        def close(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    return writers


def test_tensorboard_shows_a_step_once_after_a_kill(settings, config_path, tensorboard, monkeypatch):
    settings["train"]["logger"] = "tensorboard"
    advance = RunLog.advance

    def crash(self, step):
        advance(self, step)
        if step == 5:  # the last save was at 3
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "advance", crash)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(config_path(settings)))
    monkeypatch.setattr(RunLog, "advance", advance)
    train(load_config(config_path(settings)))
    first, second = tensorboard
    assert (first.purge_step, second.purge_step) == (0, 4)
    assert first.flushed > 0
    shown = [line for line in first.lines if line[1] < second.purge_step] + second.lines
    assert [step for name, step in shown if name == "loss"] == list(range(1, 13))


def test_a_wandb_run_that_goes_on_is_the_same_run(settings, config_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            pass

        def finish(self):
            pass

    def init(**options):
        calls.append({**options, "argv": list(sys.argv)})
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=ArithmeticError))
    monkeypatch.setattr(sys, "argv", ["train", "x.yaml", "model.transformer.token=hf_secret"])
    settings["train"]["logger"] = "wandb"
    settings["optim"]["scheduler"]["num_training_steps"] = 3
    for steps_done, resume in ((3, "auto"), (4, "auto"), (4, "never")):
        settings["optim"]["scheduler"]["num_training_steps"] = steps_done
        train(
            load_config(
                config_path(settings), [f"train.resume={resume}", "model.transformer.token=hf_secret"]
            )
        )
    first, second, anew = calls
    assert first["id"] == second["id"] != anew["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert "hf_secret" not in repr(calls)


def test_wandb_without_a_login_is_one_line(log_at, monkeypatch):
    class WandbError(Exception):
        pass

    def init(**options):
        raise WandbError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=WandbError))
    with pytest.raises(UserError, match=r"train.logger=wandb: api_key not configured .*`wandb login`"):
        log_at(0, "train.logger=wandb")
