"""A signal at any moment ends a run with what it reports on disk, exit status 75, and nothing lost."""

import contextlib
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bloomft import train as train_module
from bloomft.data import loading, token_cache
from bloomft.errors import Stopped
from bloomft.run import setup
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.log import RunLog
from bloomft.run.signals import stop_signals
from bloomft.run.state import RunState
from tests.bloomft.python_process import finish, start_python
from tests.bloomft.run_folder import lines, same_adapters


@pytest.fixture
def train_command(command, settings, config_path):
    """Runs ``bloomft.train`` with overrides; returns exit status and stderr."""

    def train_command(*overrides: str) -> tuple[int, str]:
        status, _, text = command(train_module, config_path(settings), *overrides)
        return status, text

    return train_command


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
    "while the loop is prepared": (RunState, "prepare", 1, 0),
    "before the base's evaluation": (RunLog, "message", 1, 0),
    "in the base's evaluation": (train_module, "evaluate", 1, 0),
    "in a step": (RunState, "forward_backward", 5, None),
    "after a step": (RunLog, "advance", 5, 5),
    "in an evaluation": (train_module, "evaluate", 2, 6),
    "while a step is reported": (RunLog, "record", 7, 7),
    "in a save": (setup, "save_checkpoint", 3, 9),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_saves_the_step_that_it_names(settings, train_command, monkeypatch, moment):
    owner, name, call, step = MOMENTS[moment]
    number = signal.SIGINT if "evaluation" in moment else signal.SIGTERM
    with monkeypatch.context() as patches:
        signal_at(patches, number, owner, name, call, after="save" in moment)
        status, text = train_command()
    assert status == 75
    named = held_step(text)
    run = Path(settings["train"]["output_dir"])
    assert load_checkpoint(run / "last.ckpt").step == named
    assert step is None or named == step
    log = (run / "log").read_text()
    assert held_step(log) == named
    assert held_step(log.splitlines()[-1]) == named
    # The same command goes on to the end, and its last line is true as well.
    status, text = train_command()
    assert status == 0
    assert text.splitlines()[-1].endswith("last.ckpt holds step 12 of 12")
    assert load_checkpoint(run / "last.ckpt").step == 12


@pytest.mark.parametrize(
    ("number", "owner", "name", "call"),
    [(signal.SIGTERM, train_module, "evaluate", 2), (signal.SIGINT, RunLog, "advance", 5)],
    ids=["in an evaluation", "after a step"],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    settings, train_command, monkeypatch, tmp_path, number, owner, name, call
):
    assert train_command(f"train.output_dir={tmp_path / 'whole'}")[0] == 0
    settings["train"]["save_every_n_train_steps"] = 100
    with monkeypatch.context() as patches:
        signal_at(patches, number, owner, name, call)
        assert train_command()[0] == 75
    assert train_command()[0] == 0
    assert same_adapters(tmp_path / "run", tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole") == 12


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
def test_a_stop_before_training_says_what_there_is(settings, train_command, monkeypatch, owner, name, saved):
    run = Path(settings["train"]["output_dir"])
    if saved:
        train_command("optim.scheduler.num_training_steps=3")
        before = (run / "last.ckpt").read_bytes()
    reached = []
    with monkeypatch.context() as patches:
        signal_at(patches, signal.SIGTERM, owner, name, 1)
        patches.setattr(train_module, "_loop", lambda *args: reached.append(args))
        status, text = train_command()
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


def test_a_stop_while_tokenizing_ends_it_and_leaves_no_half_cache(train_command, settings, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, token_cache, "_pieces", 3)
    assert train_command()[0] == 75
    cache = Path(settings["data"]["cache_dir"])
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_stop_in_the_last_step_is_a_finished_run(train_command, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, RunLog, "advance", 12)
    status, text = train_command()
    assert status == 0
    assert text.splitlines()[-1].endswith("last.ckpt holds step 12 of 12")


def test_a_second_signal_acts_as_if_nobody_caught_it(train_command, monkeypatch):
    def impatient(self, step):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "advance", impatient)
    # a shell's background job is started with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert train_command()[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_something_swallowed_still_stops():
    def work():
        with stop_signals() as stop, stop.at_once("nothing yet"), contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="nothing yet"):
        work()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_thread_leaves_signals_to_whoever_owns_them(run):
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, optim__scheduler__num_training_steps=2).result().step == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_sigterm_to_the_process_itself(settings, config_path, tmp_path):
    """Once while it imports, once while it trains: the two moments that only a process of its own has."""
    settings["optim"]["scheduler"]["num_training_steps"] = 4000
    settings["train"] |= {"save_every_n_train_steps": 4000, "eval_every_n_steps": 0}
    path = config_path(settings)

    def start(folder):
        return start_python("-m", "bloomft.train", path, f"train.output_dir={tmp_path / folder}")

    importing, training = start("other"), start("run")
    signals = Path(f"/proc/{importing.pid}/status")
    # SIGTERM is number 15: its bit in the mask of caught signals says that the handler is there.
    while (
        importing.poll() is None
        and not int(re.search(r"SigCgt:\s*(\w+)", signals.read_text())[1], 16) >> 14 & 1
    ):
        time.sleep(0.001)
    importing.send_signal(signal.SIGTERM)
    while training.poll() is None and lines(tmp_path / "run") < 3:
        time.sleep(0.01)
    training.send_signal(signal.SIGTERM)
    status, _, text = finish(importing)
    assert status == 75, text
    assert text == "stopped before training began; nothing is saved yet; the same command starts again\n"
    status, _, text = finish(training)
    assert status == 75, text
    named = int(re.search(r"last.ckpt holds step (\d+) of 4000", text)[1])
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").step == named >= 3
