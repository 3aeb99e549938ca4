"""What a user sees: one line and exit code 2 for a mistake, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bloomft import export, generate, train
from bloomft.errors import run_command

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
    assert "usage: python -m bloomft.train CONFIG" in fail(train)


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


def test_a_missing_logger_is_named(fail, settings, config_path):
    assert "pip install 'bloomft[wandb]'" in fail(train, config_path(settings), "train.logger=wandb")


def test_the_shipped_config_without_network_or_weights(tmp_path):
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
