"""TensorBoard and Weights & Biases beside metrics.jsonl."""

import sys
import types

import pytest

from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.run.log import RunLog
from bloomft.train import train


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


def test_tensorboard_shows_a_step_once_after_a_kill(run, tensorboard, monkeypatch):
    advance = RunLog.advance

    def crash(self, step):
        advance(self, step)
        if step == 5:  # the last save was at 3
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "advance", crash)
    with pytest.raises(KeyboardInterrupt):
        run(train__logger="tensorboard")
    monkeypatch.setattr(RunLog, "advance", advance)
    run()
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
