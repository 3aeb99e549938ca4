"""Generation from the base, a checkpoint and exported folders."""

import pytest

from bloomft import export
from bloomft.config import load_config
from bloomft.errors import UserError
from bloomft.generate import main
from bloomft.train import train


@pytest.fixture
def say(capsys):
    def say(*arguments: str) -> str:
        capsys.readouterr()
        main([*arguments, "--prompt", "# Usage", "--max-new-tokens", "12"])
        return capsys.readouterr().out

    return say


@pytest.fixture
def trained(settings, config_path):
    settings["optim"]["scheduler"]["num_training_steps"] = 20
    path = config_path(settings)
    return str(path), train(load_config(path)).run_dir


def test_same_seed_same_text_everywhere(trained, say):
    path, run_dir = trained
    base, tuned = say(path), say(path, "last.ckpt")
    assert base.startswith("# Usage")
    assert say(path) == base
    assert say(path, "last.ckpt") == tuned != base
    assert say(path, "last.ckpt", "--seed", "1") != tuned
    export.main([path, "last.ckpt"])
    export.main([path, "last.ckpt", "--format", "adapter"])
    greedy = say(path, "last.ckpt", "--temperature", "0")
    assert say(str(run_dir / "merged"), "--temperature", "0") == greedy
    assert say(path, "merged", "--temperature", "0") == greedy
    assert say(path, "adapter", "--temperature", "0") == greedy


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "many"], "invalid int value"),
        (["absent.ckpt"], "no checkpoint at absent.ckpt"),
        (["train.batch_size=x"], "command line: train.batch_size"),
    ],
)
def test_mistakes(settings, config_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        main([str(config_path(settings)), "--prompt", "x", *arguments])


def test_a_missing_or_empty_prompt(settings, config_path):
    with pytest.raises(UserError, match="--prompt"):
        main([str(config_path(settings))])
    with pytest.raises(UserError, match="at least one character"):
        main([str(config_path(settings)), "--prompt", ""])
