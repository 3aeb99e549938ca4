"""The demo to its end, and stopped, on a base and a corpus that train in seconds."""

import os
import signal
from pathlib import Path

import pytest

from bloomft import demo
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.state import RunState
from tests.bloomft.run_folder import metrics


@pytest.fixture
def small_demo(settings, config_path, monkeypatch) -> Path:
    """The demo of a small run; its folder."""
    monkeypatch.setattr(demo, "CONFIG", str(config_path(settings)))
    return Path(settings["train"]["output_dir"])


def test_both_texts_and_both_losses_are_shown(small_demo, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, output, _ = command(demo)
    assert status == 0
    before = load_checkpoint(small_demo / "last.ckpt").base_eval_loss
    after = metrics(small_demo)[-1]["eval_loss"]
    assert after < before
    base, tuned = (output.index(title) for title in ("the base writes", "after fine-tuning"))
    assert base < tuned
    prompt = demo.PROMPT.split()[1]
    assert output.count(prompt, base, tuned) == output.count(prompt, tuned) == 1
    losses = output[output.index("perplexity") :]
    assert losses.index(f"{before:.4f}") < losses.index(f"{after:.4f}")
    table = losses[: losses.index("s in total")].splitlines()
    assert max(map(len, table)) <= 80


def test_an_override_reaches_every_part_of_it(small_demo, command, tmp_path):
    status, output, _ = command(demo, f"train.output_dir={tmp_path / 'elsewhere'}")
    assert status == 0
    # a long path is broken over lines
    assert f"therunisin{tmp_path / 'elsewhere'}/" in "".join(output.split())
    assert not small_demo.exists()


def test_a_stopped_training_ends_the_demo_and_the_same_command_goes_on(small_demo, command, monkeypatch):
    step = RunState.optimizer_step

    def stop_at_4(self, rows):
        step(self, rows)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patches:
        patches.setattr(RunState, "optimizer_step", stop_at_4)
        status, output, errors = command(demo)
    assert status == 75
    assert "the same command resumes" in errors
    assert "the base writes" not in output
    assert load_checkpoint(small_demo / "last.ckpt").step == 4
    assert command(demo)[0] == 0
    assert load_checkpoint(small_demo / "last.ckpt").step == 12
