"""What cannot succeed is refused before anything large is loaded."""

import os

import pytest

from bloomft import train
from bloomft.run import setup

EARLY = {
    "logger": ("train.logger=wandb", "pip install 'bloomft[wandb]'"),
    "device": ("train.device=cuda", "train.device: cuda, but torch finds no CUDA device here"),
    "files": (
        "data.filenames=nothing-*.txt",
        "matches no file (searched from {folder}); set it to your own texts, e.g. data.filenames='texts/",
    ),
    "table": ("data.filenames=['*.md',rows.csv]", "rows.csv: .csv files are not read"),
    "batch_size": ("train.batch_size=1000000000", "train.batch_size 1000000000 x data.max_length 32"),
    "unpacked": (["train.batch_size=1000000000000", "data.packing=false"], "takes at least"),
    "max_length": ("data.max_length=1000000000000", "takes at least"),
    "accumulation": ("train.accumulate_grad_batches=1000000000", "x accumulate_grad_batches: takes at least"),
    "rank": ("model.lora.lora_dim=1000000000000", "lora_dim: 1000000000000 is not allowed"),
    "long_output": (f"train.output_dir={'x' * 300}", "x: cannot be a folder: File name too long"),
    "long_cache": (f"data.cache_dir={'x' * 300}", "x: cannot be a folder: File name too long"),
    "long_files": (f"data.filenames={'x' * 300}", "matches no file"),
    "file_above": ("train.output_dir=run.yaml/run", "run.yaml is not a folder"),
    "kwargs": ("optim.scheduler.scheduler_specific_kwargs={nothing: 1}", "optim.scheduler: linear: "),
    "text_for_a_number": (
        ["optim.scheduler.name=cosine", "optim.scheduler.scheduler_specific_kwargs={num_cycles: many}"],
        "optim.scheduler: cosine: ",
    ),
    "lr_below_its_end": (
        ["optim.scheduler.name=polynomial", "optim.optimizer.lr=1e-9"],
        "optim.scheduler: polynomial: ",
    ),
    "ignored_kwargs": (
        ["optim.scheduler.name=constant", "optim.scheduler.scheduler_specific_kwargs={num_cycles: 2}"],
        "constant takes no scheduler_specific_kwargs",
    ),
    "metric_kwargs": (
        [
            "optim.scheduler.name=reduce_lr_on_plateau",
            "optim.scheduler.scheduler_specific_kwargs={factor: x}",
        ],
        "optim.scheduler: reduce_lr_on_plateau: ",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_cannot_succeed_is_refused_before_a_base_is_loaded(
    fail, settings, config_path, tmp_path, monkeypatch, name
):
    overrides, expected = EARLY[name]
    monkeypatch.setattr(setup, "load_base", lambda _: pytest.fail("a base was loaded"))
    monkeypatch.chdir(tmp_path)
    for file in ("a.md", "rows.csv"):
        (tmp_path / file).write_text("text")
    overrides = [overrides] if isinstance(overrides, str) else overrides
    before = sorted(tmp_path.rglob("*"))
    expected = expected.replace("{folder}", str(tmp_path))
    assert expected in fail(train, config_path(settings), *overrides)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])


@pytest.mark.skipif(os.access("/proc/self", os.W_OK), reason="a user who may write everywhere")
def test_a_folder_without_permission(fail, settings, config_path):
    assert "no permission to write into /proc" in fail(
        train, config_path(settings), "train.output_dir=/proc/self/run"
    )


@pytest.mark.parametrize(
    ("override", "gib", "expected"),
    [
        (
            "data.max_length=100000000",
            4,
            "data.max_length (100000000 tokens): takes at least 35.8 GiB, there are 4.0",
        ),
        ("model.lora.lora_dim=65536", 0.25, "lora_dim 65536: takes at least 0.4 GiB, there are 0.2"),
    ],
)
def test_sizes_against_the_memory_that_there_is(
    fail, settings, config_path, monkeypatch, override, gib, expected
):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": int(gib * 2**18), "SC_PAGE_SIZE": 2**12}.get)
    monkeypatch.setattr(setup, "load_data", lambda *_: pytest.fail("the data was loaded"))
    settings["train"]["batch_size"] = 1
    assert expected in fail(train, config_path(settings), override)
