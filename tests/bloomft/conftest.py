"""A base model, a tokenizer and a run small enough to train in seconds."""

import fcntl
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from bloomft.command_line import run_command
from bloomft.config.loading import load_config
from bloomft.errors import EXIT_USAGE
from bloomft.model.base import quiet_transformers
from bloomft.train import TrainResult, train

SENTENCES = [
    "Install the package with pip and read the documentation.",
    "This library parses dates, times and time zones.",
    "Run the tests with pytest before you open a pull request.",
    "The license of this project is the MIT license.",
    "# Usage\n\nImport the module and call its main function.",
]


@pytest.fixture(autouse=True)
def _process_settings():
    torch.set_num_threads(1)
    quiet_transformers()
    yield
    # A command's setup_process must not outlive its test: hypothesis refuses floats without subnormals.
    torch.set_flush_denormal(False)


def tiny_config(**changes) -> BloomConfig:
    sizes = {"vocab_size": 384, "hidden_size": 48, "n_layer": 2, "n_head": 4, "pad_token_id": 3}
    return BloomConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes) -> BloomForCausalLM:
    """A BLOOM with weights large enough that attention and biases matter."""
    torch.manual_seed(seed)
    model = BloomForCausalLM(tiny_config(initializer_range=0.15, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def save_tiny_base(folder: Path) -> None:
    """A Hugging Face folder of a small BLOOM with its own tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        SENTENCES * 4,
        vocab_size=384,
        min_frequency=1,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    tiny_model().eval().save_pretrained(folder)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """The folder of `save_tiny_base`."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Forty short documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        text = " ".join(SENTENCES[(index + j) % len(SENTENCES)] for j in range(1 + index % 4))
        (folder / f"{index:02}.txt").write_text(f"# Package {index}\n\n{text}\n")
    return folder


@pytest.fixture
def settings(tmp_path, base_folder, corpus) -> dict:
    """The plain values of a run's configuration; tests change what they are about."""
    return {
        "data": {
            "filenames": str(corpus / "*.txt"),
            "max_length": 32,
            "heldout_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
        },
        "model": {
            "transformer": {"pretrained_model_name_or_path": str(base_folder)},
            "lora": {"lora_dim": 4, "lora_scale": 2.0},
        },
        "optim": {
            "optimizer": {"lr": 1e-2},
            "scheduler": {"name": "linear", "num_warmup_steps": 2, "num_training_steps": 12},
        },
        "train": {
            "batch_size": 4,
            "log_every_n_steps": 1,
            "save_every_n_train_steps": 3,
            "eval_every_n_steps": 6,
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "precision": "fp32",  # what auto is depends on the machine
        },
    }


@pytest.fixture
def config_path(tmp_path):
    """Writes settings to a YAML file and returns its path."""

    def write(settings: dict, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture
def run(settings, config_path):
    """Trains in this process, with changes like ``train__batch_size=2``, which stay for later calls."""

    def run(**changes) -> TrainResult:
        for path, value in changes.items():
            *parents, name = path.split("__")
            node = settings
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value
        return train(load_config(config_path(settings)))

    return run


@pytest.fixture
def trained(run, tmp_path) -> tuple[Path, Path]:
    """A finished run: its configuration's path and the run's folder."""
    return tmp_path / "run.yaml", run().run_dir


@pytest.fixture
def base_copy(base_folder, tmp_path) -> Path:
    """A copy of the base's folder, to change."""
    return Path(shutil.copytree(base_folder, tmp_path / "base copy"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command's module as ``python -m`` does, in this process; returns exit status, stdout, stderr."""

    def command(module: ModuleType, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        status = 0
        try:
            run_command(module.main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def fail(command):
    """Runs a command that has to end as the user's mistake; returns its one line of error."""

    def fail(module: ModuleType, *arguments: object) -> str:
        status, _, text = command(module, *arguments)
        assert status == EXIT_USAGE
        (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
        return error

    return fail


@pytest.fixture
def no_locks(monkeypatch) -> None:
    """A file system without locks."""

    def flock(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
