"""A run that is killed at any moment ends, started again, in the very bits of one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bloomft.config.loading import load_config
from bloomft.data.rows import PackedDataset
from bloomft.errors import UserError
from bloomft.files import write_atomically
from bloomft.run.checkpoint import load_checkpoint, save_checkpoint
from bloomft.train import train


def start(path: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bloomft.train", str(path)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_sigkill_at_many_moments(settings, config_path, tmp_path):
    settings["optim"]["scheduler"]["num_training_steps"] = 160
    settings["model"]["lora"]["lora_dropout"] = 0.1
    settings["train"]["save_every_n_train_steps"] = 7
    settings["train"]["output_dir"] = str(tmp_path / "whole")
    whole = start(config_path(settings, "whole.yaml"))
    assert whole.wait(timeout=200) == 0, whole.stderr.read()

    settings["train"]["output_dir"] = str(tmp_path / "killed")
    path = config_path(settings, "killed.yaml")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kills = 0
    # Before the first checkpoint, soon after one, and between two.
    for target in (3, 40, 90):
        process = start(path)
        while process.poll() is None and lines(metrics) < target:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    last = start(path)
    assert last.wait(timeout=200) == 0, last.stderr.read()

    expected = load_checkpoint(tmp_path / "whole" / "last.ckpt")
    actual = load_checkpoint(tmp_path / "killed" / "last.ckpt")
    assert actual.step == expected.step == 160
    for name, value in expected.adapters.items():
        assert torch.equal(actual.adapters[name], value), name
    assert lines(metrics) == lines(tmp_path / "whole" / "metrics.jsonl") == 160


def test_ctrl_c_saves_and_the_run_goes_on(settings, config_path, tmp_path, monkeypatch):
    whole = train(load_config(config_path(settings)))
    settings["train"]["output_dir"] = str(tmp_path / "stopped")
    settings["train"]["save_every_n_train_steps"] = 100
    config = load_config(config_path(settings))

    from bloomft.run.log import RunLog

    advance = RunLog.advance

    def interrupt(self, step):
        advance(self, step)
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "advance", interrupt)
    stopped = train(config)
    assert stopped.step == 5
    monkeypatch.setattr(RunLog, "advance", advance)
    assert train(config).step == 12
    expected = load_checkpoint(whole.run_dir / "last.ckpt").adapters
    actual = load_checkpoint(stopped.run_dir / "last.ckpt").adapters
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_resuming_from_every_checkpoint_ends_in_the_same_bits(settings, config_path, tmp_path):
    settings["train"]["save_every_n_train_steps"] = 1
    settings["train"]["log_every_n_steps"] = 4
    settings["model"]["lora"]["lora_dropout"] = 0.2
    whole = train(load_config(config_path(settings)))
    expected = load_checkpoint(whole.run_dir / "last.ckpt").adapters
    reported = (whole.run_dir / "metrics.jsonl").read_text().splitlines()[-1].split("tokens_per_second")[0]
    for step in (1, 6, 11):
        settings["train"]["output_dir"] = str(tmp_path / f"from-{step}")
        settings["train"]["resume"] = str(whole.run_dir / f"step-{step}.ckpt")
        again = train(load_config(config_path(settings)))
        actual = load_checkpoint(again.run_dir / "last.ckpt").adapters
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        last = (again.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
        assert last.startswith(reported), "the window of the last line lost something"


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 1), (3, 2)])
def test_another_batch_size_neither_skips_nor_repeats_rows(
    settings, config_path, monkeypatch, batch_size, accumulate
):
    taken = []
    batch = PackedDataset.batch

    def note(self, position, size):
        taken.extend(range(position, position + size))
        return batch(self, position, size)

    monkeypatch.setattr(PackedDataset, "batch", note)
    settings["optim"]["scheduler"]["num_training_steps"] = 5
    train(load_config(config_path(settings)))
    settings["optim"]["scheduler"]["num_training_steps"] = 9
    settings["train"] |= {"batch_size": batch_size, "accumulate_grad_batches": accumulate}
    result = train(load_config(config_path(settings)))
    assert taken == list(range(5 * 4 + 4 * batch_size * accumulate))
    assert load_checkpoint(result.run_dir / "last.ckpt").position == len(taken)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_damaged_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last.ckpt: not a checkpoint of bloomft, or a damaged one"):
        load_checkpoint(path)


def test_a_truncated_or_foreign_checkpoint_is_named(settings, config_path, tmp_path):
    path = train(load_config(config_path(settings))).run_dir / "last.ckpt"
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(cut)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of bloomft"):
        load_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(tmp_path / "absent.ckpt")


def test_another_base_model_is_refused(settings, config_path, base_folder, tmp_path):
    from transformers import AutoTokenizer, BloomForCausalLM

    train(load_config(config_path(settings)))
    model = BloomForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_4h_to_h.bias += 1e-3
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "other")
    settings["model"]["transformer"]["pretrained_model_name_or_path"] = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"trained on the base model .* but .*other \(\w{8}\) is a different"):
        train(load_config(config_path(settings)))


def test_a_full_disk_leaves_the_old_checkpoint(settings, config_path, monkeypatch, tmp_path):
    result = train(load_config(config_path(settings)))
    path = result.run_dir / "last.ckpt"
    before, state = path.read_bytes(), load_checkpoint(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(state, result.run_dir, keep=False)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(tmp_path / "new", b"content")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".new*"))
