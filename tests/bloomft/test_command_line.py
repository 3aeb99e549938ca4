"""What a user sees: one line and exit code 2 for a mistake, never a traceback."""

import importlib
import re
import sys

import pytest
from transformers import AutoTokenizer

from bloomft import export, generate, train
from bloomft.command_line import COMMANDS
from bloomft.errors import UserError
from bloomft.run import generation
from tests.bloomft.python_process import ROOT, finish, run_python, start_python


def test_missing_configuration(fail, tmp_path):
    assert "none.yaml: cannot read the configuration" in fail(train, tmp_path / "none.yaml")
    assert "bloomft.train: the following arguments are required: CONFIG; see --help" in fail(train)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["run.yaml", "--help"], ["a.b=c", "-h", "run.yaml"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_no_mistake(command, monkeypatch, name, words):
    monkeypatch.setenv("COLUMNS", "80")
    status, output, errors = command(importlib.import_module(f"bloomft.{name}"), *words)
    assert (status, errors) == (0, "")
    assert output.startswith(f"usage: python -m bloomft.{name} ")
    assert max(map(len, output.splitlines())) <= 80
    *_, examples = output.partition("examples:\n")
    assert examples.startswith(f"  python -m bloomft.{name}")


@pytest.mark.parametrize(
    ("called", "program"),
    [
        ("/usr/local/bin/bloomft", "bloomft train"),
        (ROOT / "bloomft/__main__.py", "python -m bloomft train"),
        (ROOT / "bloomft/train.py", "python -m bloomft.train"),
        ("/usr/lib/pytest/__main__.py", "python -m bloomft.train"),
    ],
)
def test_help_and_errors_name_the_program_as_it_was_called(monkeypatch, capsys, called, program):
    monkeypatch.setattr(sys, "argv", [str(called)])
    with pytest.raises(SystemExit):
        train.main(["--help"])
    output = capsys.readouterr().out
    assert output.startswith(f"usage: {program} CONFIG [key=value ...]\n")
    assert f"  {program} run.yaml" in output
    with pytest.raises(UserError, match=f"^{re.escape(program)}: the following"):
        train.main([])


@pytest.mark.parametrize("called", ["-m bloomft.demo --help", "-m bloomft train run.yaml --help"])
def test_help_of_a_process(called):
    assert run_python(*called.split()).startswith("usage: python -m bloomft")


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


def test_more_than_the_tokenizer_s_own_limit(fail, settings, config_path, base_copy):
    tokenizer = AutoTokenizer.from_pretrained(base_copy)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(base_copy)
    settings["model"]["transformer"]["pretrained_model_name_or_path"] = str(base_copy)
    assert "data.max_length is 32, but the tokenizer of" in fail(train, config_path(settings))


def test_export_and_generate_usage(fail, settings, config_path):
    path = config_path(settings)
    assert "the following arguments are required: CHECKPOINT" in fail(export, path)
    assert "invalid choice: 'onnx'" in fail(export, path, "last.ckpt", "--format", "onnx")
    assert "unrecognized arguments: --fast" in fail(generate, path, "--prompt", "x", "--fast")


@pytest.mark.parametrize("module", [export, generate])
def test_the_other_commands_look_for_the_device_first(
    fail, settings, config_path, monkeypatch, module, tmp_path
):
    owner = generation if module is generate else module
    monkeypatch.setattr(owner, "load_base", lambda _: pytest.fail("a base was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_text("")
    more = ["--prompt", "x"] if module is generate else ["--output", "out"]
    assert "no CUDA device" in fail(module, config_path(settings), "last.ckpt", *more, "train.device=cuda")


@pytest.mark.parametrize("module", [export, generate])
def test_names_of_300_characters(fail, settings, config_path, module):
    more = ["--prompt", "x"] if module is generate else []
    name = "x" * 300
    assert "File name too long" in fail(module, name, name, *more)
    assert "unknown key" in fail(module, config_path(settings), "last.ckpt", *more, f"{name}=3")
    if module is export:
        assert "File name too long" in fail(
            export, config_path(settings), config_path(settings), "--output", name
        )


def test_the_shipped_config_without_network_or_weights(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.txt").write_text("text")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = ["-m", "bloomft.train", ROOT / "configs/bloom-1b7.yaml"]
    status, _, errors = finish(start_python(*command, cwd=tmp_path, **offline))
    assert status == 2
    assert errors.count("\n") == 1
    assert (
        "bigscience/bloom-1b7: not a local folder, and it could not be downloaded from the model hub"
        in errors
    )
    assert "pretrained_model_name_or_path=/path/to/the/folder" in errors


def test_the_shipped_config_where_its_examples_are_not(fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fail(train, "configs/bloom-1b7.yaml")
    assert f"'examples/*.txt' matches no file (searched from {tmp_path}); set it to your own texts" in line
    assert list(tmp_path.iterdir()) == []
