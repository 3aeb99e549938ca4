"""A run that is killed at any moment ends, started again, in the very bits of one that never was."""

import signal
import time

import pytest
import torch
from transformers import BloomForCausalLM

from bloomft.data.rows import PackedDataset
from bloomft.errors import UserError
from bloomft.run.checkpoint import load_checkpoint
from tests.bloomft.python_process import finish, run_python, start_python
from tests.bloomft.run_folder import lines, same_adapters


def test_sigkill_at_many_moments(settings, config_path, tmp_path):
    settings["optim"]["scheduler"]["num_training_steps"] = 160
    settings["model"]["lora"]["lora_dropout"] = 0.1
    settings["train"]["save_every_n_train_steps"] = 7
    command = ["-m", "bloomft.train", config_path(settings)]
    run_python(*command, f"train.output_dir={tmp_path / 'whole'}")

    command.append(f"train.output_dir={tmp_path / 'killed'}")
    kills = 0
    # Before the first checkpoint, soon after one, and between two.
    for target in (3, 40, 90):
        process = start_python(*command)
        while process.poll() is None and lines(tmp_path / "killed") < target:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        finish(process)
    assert kills == 3
    run_python(*command)

    for folder in (tmp_path / "whole", tmp_path / "killed"):
        assert load_checkpoint(folder / "last.ckpt").step == lines(folder) == 160
    assert same_adapters(tmp_path / "killed", tmp_path / "whole")


def test_resuming_from_every_checkpoint_ends_in_the_same_bits(run, settings, tmp_path):
    settings["train"] |= {"save_every_n_train_steps": 1, "log_every_n_steps": 4}
    whole = run(model__lora__lora_dropout=0.2).run_dir
    reported = (whole / "metrics.jsonl").read_text().splitlines()[-1].split("tokens_per_second")[0]
    for step in (1, 6, 11):
        settings["train"]["output_dir"] = str(tmp_path / f"from-{step}")
        again = run(train__resume=str(whole / f"step-{step}.ckpt")).run_dir
        assert same_adapters(again, whole)
        last = (again / "metrics.jsonl").read_text().splitlines()[-1]
        assert last.startswith(reported), "the window of the last line lost something"


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 1), (3, 2)])
def test_another_batch_size_neither_skips_nor_repeats_rows(run, monkeypatch, batch_size, accumulate):
    taken = []
    batch = PackedDataset.batch

    def note(self, position, size):
        taken.extend(range(position, position + size))
        return batch(self, position, size)

    monkeypatch.setattr(PackedDataset, "batch", note)
    run(optim__scheduler__num_training_steps=5)
    cut = {"train__batch_size": batch_size, "train__accumulate_grad_batches": accumulate}
    result = run(optim__scheduler__num_training_steps=9, **cut)
    assert taken == list(range(5 * 4 + 4 * batch_size * accumulate))
    assert load_checkpoint(result.run_dir / "last.ckpt").position == len(taken)


def test_another_base_model_is_refused(run, base_folder, base_copy):
    run()
    model = BloomForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_4h_to_h.bias += 1e-3
    model.save_pretrained(base_copy)
    with pytest.raises(UserError, match=r"trained on the base model .* but .*copy \(\w{8}\) is a different"):
        run(model__transformer__pretrained_model_name_or_path=str(base_copy))


@pytest.mark.parametrize("damage", ["missing", "damaged", "two damaged"])
def test_without_a_whole_last_checkpoint_the_newest_whole_one_is_taken(short_run, settings, damage, tmp_path):
    whole = short_run().run_dir
    settings["train"]["output_dir"] = str(tmp_path / "again")
    again = short_run().run_dir
    (again / "step-6.ckpt").unlink()
    last = again / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    taken = "step-4.ckpt, step 4"
    if damage == "missing":
        last.unlink()
    if damage == "two damaged":
        (again / "step-4.ckpt").write_bytes(b"")
        taken = "step-2.ckpt, step 2"
    assert short_run().step == 6
    log = (again / "log").read_text()
    assert f"going on from {again / taken}\n" in log
    assert ("last.ckpt is missing" if damage == "missing" else "last.ckpt: not a checkpoint") in log
    assert same_adapters(again, whole)
    assert lines(again) == 6


def test_checkpoints_that_are_all_damaged_are_not_taken_for_a_fresh_start(short_run):
    folder = short_run().run_dir
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"last.ckpt: .*damaged one; train.resume=never starts anew"):
        short_run()
    assert (folder / "last.ckpt").read_bytes() == b"damaged"


def test_fewer_steps_than_done_are_refused(short_run):
    folder = short_run().run_dir
    before = (folder / "last.ckpt").read_bytes()
    with pytest.raises(UserError, match=r"num_training_steps is 5, but .*last.ckpt holds step 6; raise it"):
        short_run(optim__scheduler__num_training_steps=5)
    assert (folder / "last.ckpt").read_bytes() == before
