"""A sharded base trains as a whole one does, whatever else is configured."""

import functools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.model.base import load_base
from bloomft.ranks import Ranks
from bloomft.run import setup
from bloomft.run.checkpoint import load_checkpoint
from bloomft.run.strategy import choose_strategy
from tests.bloomft.run.test_ranks import TOLERANCE, after_step, close, launch, rank  # noqa: F401, a fixture
from tests.bloomft.run_folder import adapters, metrics, same_adapters

VARIANTS = {
    "full checkpointing, dropout": {
        "train__gradient_checkpointing": True,
        "model__lora__lora_dropout": 0.1,
        "data__packing": True,
    },
    "selective, plateau": {
        "train__gradient_checkpointing": "selective",
        "optim__scheduler__name": "reduce_lr_on_plateau",
        "train__eval_every_n_steps": 2,
    },
    "compiled, cosine": {"train__compile": True, "data__packing": True, "optim__scheduler__name": "cosine"},
    "fp16, queries and values": {"train__precision": "fp16", "model__lora__parts": ["q", "v"]},
    "bf16, another layer": {
        "train__precision": "bf16",
        "model__lora__attention_layer_name": "dense_4h_to_h",
        "optim__scheduler__name": "constant",
    },
}


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_processes_train_as_one(run, launch, tmp_path, variant, strategy):  # noqa: F811
    changes = VARIANTS[variant] | {"optim__scheduler__num_training_steps": 6}
    alone = run(train__accumulate_grad_batches=2, train__output_dir=str(tmp_path / "alone"), **changes)
    together = tmp_path / "together"
    job = launch(
        2,
        f"train.strategy={strategy}",
        f"train.output_dir={together}",
        "train.accumulate_grad_batches=1",
    )
    assert job.finish() == [0, 0], job.errors()
    first, *later = zip(metrics(alone.run_dir), metrics(together), strict=True)
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], abs=TOLERANCE)
    # another order of a float32 sum turns roundings of a 16-bit gradient, and Adam's steps with them
    dtype = DTYPES.get(changes.get("train__precision"))
    largest = TOLERANCE if dtype is None else torch.finfo(dtype).eps
    for left, right in later:
        assert right["loss"] == pytest.approx(left["loss"], abs=largest)
        assert right.get("eval_loss") == pytest.approx(left.get("eval_loss"), abs=largest)
    if dtype is None:
        close(adapters(together), adapters(alone.run_dir))


def replace_the_base_in_process_1(what: str) -> None:
    """Process 1 has identified the base when its file gets another content, or disappears."""
    if rank() == 1:
        shard = setup.shard_base

        def shard_base(model, *arguments, **options):
            (file,) = Path(os.environ["BASE"]).glob("*.safetensors")
            if what == "other weights":
                save_file(load_file(file), file, {"format": "pt"})
            elif what == "cut short":
                file.write_bytes(file.read_bytes()[:-100])
            else:
                file.unlink()
            shard(model, *arguments, **options)

        setup.shard_base = shard_base


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("other weights", "was changed while it was read"),
        ("cut short", "cannot be read: "),
        ("nothing", "cannot be read: No such file"),
    ],
)
def test_a_base_that_changes_while_it_is_read_is_a_line(launch, base_copy, what, expected):  # noqa: F811
    job = launch(
        2,
        "train.strategy=fsdp",
        f"model.transformer.pretrained_model_name_or_path={base_copy}",
        before=functools.partial(replace_the_base_in_process_1, what),
        BASE=str(base_copy),
    )
    statuses, errors = job.finish(), job.errors()
    assert statuses[1] == 2
    assert errors[1].startswith(f"error: {base_copy / 'model.safetensors'}: {expected}")
    assert errors[1].count("\n") == 1
    # process 0 may have read its own part before, or may see the same
    assert statuses[0] in (1, 2), errors[0]
    assert "Traceback" not in errors[0]


def kill_every_process() -> None:
    after_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL), everywhere=True)


def test_all_killed_go_on_as_one_as_four_and_with_the_other_strategy(run, launch, tmp_path):  # noqa: F811
    whole = run(train__accumulate_grad_batches=4, train__output_dir=str(tmp_path / "whole"))

    def go_on(size: int, strategy: str, name: str, before=None) -> list[int | None]:
        folder, accumulate = f"train.output_dir={tmp_path / name}", 4 // size
        changes = (f"train.strategy={strategy}", f"train.accumulate_grad_batches={accumulate}")
        return launch(size, folder, *changes, before=before).finish()

    assert go_on(2, "fsdp", "run", kill_every_process) == [-signal.SIGKILL] * 2
    assert load_checkpoint(tmp_path / "run" / "last.ckpt").step == 3
    for name in ("four", "ddp"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    assert go_on(4, "fsdp", "four") == [0] * 4
    assert go_on(2, "ddp", "ddp") == [0] * 2
    # what a single process ignores is still in the configuration
    run(train__accumulate_grad_batches=4, train__strategy="fsdp", train__output_dir=str(tmp_path / "run"))
    for name in ("four", "ddp", "run"):
        close(adapters(tmp_path / name), adapters(whole.run_dir))
        for left, right in zip(metrics(tmp_path / name), metrics(whole.run_dir), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], abs=TOLERANCE)


def test_a_resumed_run_in_shards_has_the_same_bits(launch, tmp_path):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 9), (parts, 5), (parts, 9)):
        job = launch(
            2,
            f"train.output_dir={folder}",
            "train.strategy=fsdp",
            "model.lora.lora_dropout=0.1",
            "optim.scheduler.name=constant",
            f"optim.scheduler.num_training_steps={steps}",
        )
        assert job.finish() == [0, 0], job.errors()
    assert same_adapters(whole, parts)


def test_more_processes_than_held_out_rows(run, launch, tmp_path, settings):  # noqa: F811
    settings["train"] |= {"eval_max_batches": 1, "batch_size": 1}
    settings["data"] |= {"heldout_fraction": 0.01}
    alone = run(train__output_dir=str(tmp_path / "alone"), train__batch_size=3)
    changes = (f"train.output_dir={tmp_path / 'three'}", "train.batch_size=1", "train.strategy=fsdp")
    job = launch(3, *changes)
    assert job.finish() == [0] * 3, job.errors()
    ours, theirs = (
        [line["eval_loss"] for line in metrics(folder) if "eval_loss" in line]
        for folder in (tmp_path / "three", alone.run_dir)
    )
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("changes", [{"strategy": "ddp"}, {"strategy": "fsdp"}])
def test_an_offload_without_a_gpu_is_a_line(run, changes):
    with pytest.raises(
        UserError, match=r"train.cpu_offload: needs train.strategy fsdp, several processes and"
    ):
        run(train__cpu_offload=True, **{f"train__{key}": value for key, value in changes.items()})


def test_auto_shards_where_the_base_takes_over_half_of_a_gpu(monkeypatch, settings, config_path):
    config = load_config(config_path(settings))
    model = load_base(config.model.transformer, weights=False).model
    weights = sum(parameter.numel() for parameter in model.parameters())

    class Gpu:
        total_memory = 2 * 2 * weights

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    chosen = {
        dtype: choose_strategy(config, torch.device("cuda"), dtype, Ranks(0, 2)).name
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert chosen == {torch.bfloat16: "ddp", torch.float32: "fsdp"}
