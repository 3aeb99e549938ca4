"""What a user sees: one line and exit code 2 for a mistake, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bloomft import export, generate, train
from bloomft.command_line import run_command
from bloomft.config.keys import SCHEDULES
from bloomft.config.loading import load_config
from bloomft.run import generation, setup
from bloomft.run.early_checks import check_early

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fail(monkeypatch, capsys):
    """Runs a command's main as ``python -m`` does and returns its one line of error."""

    def fail(module, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_command(module.main)
        assert stopped.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return fail


def test_missing_configuration(fail, tmp_path):
    assert "none.yaml: cannot read the configuration" in fail(train, tmp_path / "none.yaml")
    assert "bloomft.train: the following arguments are required: config; see --help" in fail(train)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["run.yaml", "--help"]])
def test_help_is_no_mistake(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as stopped:
        run_command(train.main)
    assert stopped.value.code == 0
    assert "usage: python -m bloomft.train CONFIG [key=value ...]" in capsys.readouterr().out


def test_no_file_matches(fail, settings, config_path, tmp_path):
    settings["data"]["filenames"] = str(tmp_path / "nothing-*.txt")
    assert "nothing-*.txt" in fail(train, config_path(settings))


def test_nothing_readable_is_left(fail, settings, config_path, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty.txt").write_text(" \n")
    settings["data"]["filenames"] = [str(tmp_path / "binary.txt"), str(tmp_path / "empty.txt")]
    line = fail(train, config_path(settings))
    assert "1 with invalid UTF-8" in line
    assert "1 empty" in line


def test_invalid_utf8_and_empty_documents_are_skipped_with_a_count(settings, config_path, corpus, capsys):
    (corpus / "98.txt").write_bytes(b"\xff\xfe\xfa")
    (corpus / "99.txt").write_text("")
    settings["optim"]["scheduler"]["num_training_steps"] = 2
    train.main([str(config_path(settings))])
    assert "1 with invalid UTF-8, 1 empty" in capsys.readouterr().err


def test_wrong_checkpoints(fail, settings, config_path, tmp_path):
    path = config_path(settings)
    assert "no checkpoint at last.ckpt or" in fail(export, path, "last.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for module in (export, generate):
        more = ["--prompt", "x"] if module is generate else []
        assert "text.ckpt: not a checkpoint of bloomft" in fail(module, path, tmp_path / "text.ckpt", *more)
    assert "text.ckpt: not a checkpoint" in fail(train, path, f"train.resume={tmp_path / 'text.ckpt'}")


@pytest.mark.parametrize("key", ["train.output_dir", "data.cache_dir"])
def test_unwritable_folders(fail, settings, config_path, tmp_path, key):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in fail(train, config_path(settings), f"{key}={tmp_path / 'file' / 'run'}")


def test_models_that_cannot_be_loaded(fail, settings, config_path, tmp_path):
    path = config_path(settings)
    key = "model.transformer.pretrained_model_name_or_path"
    assert "no such folder" in fail(train, path, f"{key}={tmp_path}/absent")
    (tmp_path / "empty").mkdir()
    assert "not a loadable BLOOM folder" in fail(train, path, f"{key}={tmp_path}/empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "a gpt2 model; this program fine-tunes BLOOM" in fail(train, path, f"{key}={tmp_path}/other")


@pytest.mark.parametrize("target", ["qkv", "lm_head"])
def test_a_wrong_target(fail, settings, config_path, target):
    line = fail(train, config_path(settings), f"model.lora.attention_layer_name={target}")
    assert f"attention_layer_name: {target} is not allowed; allowed: query_key_value, dense," in line


def test_more_than_the_tokenizer_s_own_limit(fail, settings, config_path, base_folder, tmp_path):
    from transformers import AutoTokenizer, BloomForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path / "short")
    BloomForCausalLM.from_pretrained(base_folder).save_pretrained(tmp_path / "short")
    settings["model"]["transformer"]["pretrained_model_name_or_path"] = str(tmp_path / "short")
    assert "data.max_length is 32, but the tokenizer of" in fail(train, config_path(settings))


def test_export_and_generate_usage(fail, settings, config_path):
    path = config_path(settings)
    assert "the following arguments are required: checkpoint" in fail(export, path)
    assert "invalid choice: 'onnx'" in fail(export, path, "last.ckpt", "--format", "onnx")
    assert "unrecognized arguments: --fast" in fail(generate, path, "--prompt", "x", "--fast")


EARLY = {
    "logger": ("train.logger=wandb", "pip install 'bloomft[wandb]'"),
    "device": ("train.device=cuda", "train.device: cuda, but torch finds no CUDA device here"),
    "files": ("data.filenames=nothing-*.txt", "matches no file"),
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
    assert expected in fail(train, config_path(settings), *overrides)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])


@pytest.mark.skipif(os.access("/proc/self", os.W_OK), reason="a user who may write everywhere")
def test_a_folder_without_permission(fail, settings, config_path):
    assert "no permission to write into /proc" in fail(
        train, config_path(settings), "train.output_dir=/proc/self/run"
    )


SCHEDULE_KWARGS = {
    "cosine_with_min_lr": "{min_lr_rate: 0.1}",
    "cosine_warmup_with_min_lr": "{min_lr: 1e-5}",
    "warmup_stable_decay": "{num_decay_steps: 3}",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_passes_the_early_check(settings, config_path, name):
    words = [f"optim.scheduler.name={name}"]
    if name in SCHEDULE_KWARGS:
        words.append(f"optim.scheduler.scheduler_specific_kwargs={SCHEDULE_KWARGS[name]}")
    check_early(load_config(config_path(settings), words))


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


@pytest.mark.parametrize("command", [export, generate])
def test_the_other_commands_look_for_the_device_first(
    fail, settings, config_path, monkeypatch, command, tmp_path
):
    owner = generation if command is generate else command
    monkeypatch.setattr(owner, "load_base", lambda _: pytest.fail("a base was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_text("")
    more = ["--prompt", "x"] if command is generate else ["--output", "out"]
    assert "no CUDA device" in fail(command, config_path(settings), "last.ckpt", *more, "train.device=cuda")


@pytest.mark.parametrize("command", [export, generate])
def test_names_of_300_characters(fail, settings, config_path, command):
    more = ["--prompt", "x"] if command is generate else []
    name = "x" * 300
    assert "File name too long" in fail(command, name, name, *more)
    assert "unknown key" in fail(command, config_path(settings), "last.ckpt", *more, f"{name}=3")
    if command is export:
        assert "File name too long" in fail(
            export, config_path(settings), config_path(settings), "--output", name
        )


def test_the_shipped_config_without_network_or_weights(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.txt").write_text("text")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bloomft.train", str(ROOT / "configs/bloom-1b7.yaml")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "bigscience/bloom-1b7: not a local folder, and it could not be downloaded from the model hub"
        in done.stderr
    )
    assert "pretrained_model_name_or_path=/path/to/the/folder" in done.stderr
