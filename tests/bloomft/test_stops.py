"""A signal at any moment ends a run with what it reports on disk, exit status 75, and nothing lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bloomft import train as train_module
from bloomft.command_line import run_command
from bloomft.config.loading import load_config
from bloomft.data import loading
from bloomft.errors import Stopped
from bloomft.run import setup
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.log import RunLog
from bloomft.run.signals import stop_signals
from bloomft.run.state import RunState
from bloomft.train import train


@pytest.fixture
def command(settings, config_path, monkeypatch, capsys):
    """Runs ``bloomft.train`` as ``python -m`` does, in this process; returns exit status and stderr."""

    def command(*overrides: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train", str(config_path(settings)), *overrides])
        try:
            run_command(train_module.main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return command


def signal_at(monkeypatch, number, owner, name, call, after=False):
    """Raise ``number`` in the ``call``-th call (from 1) of ``owner.name``, before or after its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            signal.raise_signal(number)
        result = original(*args, **kwargs)
        if len(calls) == call and after:
            signal.raise_signal(number)
        return result

    monkeypatch.setattr(owner, name, wrapped)


def held_step(text: str) -> int:
    """The step that the one line about the stop names."""
    found = re.findall(r"stopped; \S+last\.ckpt holds step (\d+) of 12; the same command resumes", text)
    assert len(found) == 1, text
    return int(found[0])


# Evaluations: of the base, at step 6, at step 12; saves at 3, 6, 9, 12.
MOMENTS = {
    "while the loop is prepared": (RunState, "begin", 1, 0),
    "before the base's evaluation": (RunLog, "message", 1, 0),
    "in the base's evaluation": (train_module, "evaluate", 1, 0),
    "in a step": (RunState, "micro_batch", 5, None),
    "after a step": (RunLog, "advance", 5, 5),
    "in an evaluation": (train_module, "evaluate", 2, 6),
    "while a step is reported": (RunLog, "record", 7, 7),
    "in a save": (setup, "save_checkpoint", 3, 9),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_saves_the_step_that_it_names(settings, command, monkeypatch, moment):
    owner, name, call, step = MOMENTS[moment]
    number = signal.SIGINT if "evaluation" in moment else signal.SIGTERM
    with monkeypatch.context() as patches:
        signal_at(patches, number, owner, name, call, after="save" in moment)
        status, text = command()
    assert status == 75
    named = held_step(text)
    run = Path(settings["train"]["output_dir"])
    assert load_checkpoint(run / "last.ckpt").step == named
    assert step is None or named == step
    log = (run / "log").read_text()
    assert held_step(log) == named
    assert held_step(log.splitlines()[-1]) == named
    # The same command goes on to the end, and its last line is true as well.
    status, text = command()
    assert status == 0
    assert text.splitlines()[-1].endswith("last.ckpt holds step 12 of 12")
    assert load_checkpoint(run / "last.ckpt").step == 12


def test_a_stop_in_an_evaluation_loses_nothing(settings, command, monkeypatch, tmp_path):
    whole = command(f"train.output_dir={tmp_path / 'whole'}")
    assert whole[0] == 0
    settings["train"]["save_every_n_train_steps"] = 100
    with monkeypatch.context() as patches:
        signal_at(patches, signal.SIGTERM, train_module, "evaluate", 2)
        assert command()[0] == 75
    assert command()[0] == 0
    expected = load_checkpoint(tmp_path / "whole" / "last.ckpt").adapters
    actual = load_checkpoint(tmp_path / "run" / "last.ckpt").adapters
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    metrics = [(tmp_path / folder / "metrics.jsonl").read_text().count("\n") for folder in ("whole", "run")]
    assert metrics == [12, 12]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (train_module, "parse_command"),
        (setup, "find_resumption"),
        (setup, "load_base"),
        (setup, "patch_base"),
        (loading, "build_token_cache"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_a_stop_before_training_says_what_there_is(settings, command, monkeypatch, owner, name, saved):
    run = Path(settings["train"]["output_dir"])
    if saved:
        command("optim.scheduler.num_training_steps=3")
        before = (run / "last.ckpt").read_bytes()
    reached = []
    with monkeypatch.context() as patches:
        signal_at(patches, signal.SIGTERM, owner, name, 1)
        patches.setattr(train_module, "_loop", lambda *args: reached.append(args))
        status, text = command()
    assert status == 75
    assert not reached
    (line,) = [line for line in text.splitlines() if line.startswith("stopped")]
    if saved:
        assert line == f"stopped before training began; {run / 'last.ckpt'} is as it was; " + (
            "the same command starts again"
        )
        assert (run / "last.ckpt").read_bytes() == before
    else:
        assert line == "stopped before training began; nothing is saved yet; the same command starts again"
        assert not list(run.glob("*.ckpt"))


def test_a_stop_while_tokenizing_ends_it_and_leaves_no_half_cache(command, settings, monkeypatch):
    from bloomft.data import token_cache

    signal_at(monkeypatch, signal.SIGTERM, token_cache, "_pieces", 3)
    assert command()[0] == 75
    cache = Path(settings["data"]["cache_dir"])
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_stop_in_the_last_step_is_a_finished_run(command, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, RunLog, "advance", 12)
    status, text = command()
    assert status == 0
    assert text.splitlines()[-1].endswith("last.ckpt holds step 12 of 12")


def test_a_second_signal_acts_as_if_nobody_caught_it(command, monkeypatch):
    def impatient(self, step):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "advance", impatient)
    # a shell's background job is started with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command()[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_something_swallowed_still_stops():
    def work():
        with stop_signals() as stop, stop.at_once("nothing yet"), contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="nothing yet"):
        work()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_thread_leaves_signals_to_whoever_owns_them(settings, config_path):
    from concurrent.futures import ThreadPoolExecutor

    settings["optim"]["scheduler"]["num_training_steps"] = 2
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, load_config(config_path(settings))).result().step == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_sigterm_to_the_process_itself(settings, config_path, tmp_path):
    """Once while it imports, once while it trains: the two moments that only a process of its own has."""
    settings["optim"]["scheduler"]["num_training_steps"] = 4000
    settings["train"] |= {"save_every_n_train_steps": 4000, "eval_every_n_steps": 0}
    path = config_path(settings)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-m", "bloomft.train", str(path), f"train.output_dir={tmp_path / folder}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    importing, training = start("other"), start("run")
    status = Path(f"/proc/{importing.pid}/status")
    # SIGTERM is number 15: its bit in the mask of caught signals says that the handler is there.
    while (
        importing.poll() is None
        and not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1
    ):
        time.sleep(0.001)
    importing.send_signal(signal.SIGTERM)
    while training.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    training.send_signal(signal.SIGTERM)
    _, text = importing.communicate(timeout=100)
    assert importing.returncode == 75, text
    assert text == "stopped before training began; nothing is saved yet; the same command starts again\n"
    _, text = training.communicate(timeout=100)
    assert training.returncode == 75, text
    named = int(re.search(r"last.ckpt holds step (\d+) of 4000", text)[1])
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").step == named >= 3
