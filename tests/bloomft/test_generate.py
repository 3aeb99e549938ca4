"""Generation from the base, a checkpoint and exported folders."""

import pytest
import torch
from transformers import BloomForCausalLM

from bloomft import export, generate
from bloomft.errors import UserError
from bloomft.generate import main


@pytest.fixture
def say(capsys):
    def say(*arguments: object) -> str:
        capsys.readouterr()
        main([*map(str, arguments), "--prompt", "# Usage", "--max-new-tokens", "12"])
        return capsys.readouterr().out

    return say


def test_same_seed_same_text_everywhere(trained, say):
    path, run_dir = trained
    base, tuned = say(path), say(path, "last.ckpt")
    assert base.startswith("# Usage")
    assert say(path) == base
    assert say(path, "last.ckpt") == tuned != base
    assert say(path, "last.ckpt", "--seed", "1") != tuned
    export.main([str(path), "last.ckpt"])
    export.main([str(path), "last.ckpt", "--format", "adapter"])
    greedy = say(path, "last.ckpt", "--temperature", "0")
    assert say(run_dir / "merged", "--temperature", "0") == greedy
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


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_export_is_read_with_its_own_base_alone(trained, say, base_folder, base_copy, kind):
    path, _ = trained
    export.main([str(path), "last.ckpt", "--format", kind])
    model = BloomForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] += 1
    model.save_pretrained(base_copy)
    with pytest.raises(UserError, match="base"):
        say(path, kind, f"model.transformer.pretrained_model_name_or_path={base_copy}")
    assert say(path, kind).startswith("# Usage")


@pytest.mark.parametrize("writer", ["bloomft", "another program"])
def test_an_adapter_alone_names_its_base_and_what_to_give(trained, say, fail, base_folder, writer):
    path, run_dir = trained
    adapter = run_dir / "adapter"
    export.main([str(path), "last.ckpt", "--format", "adapter"])
    if writer == "another program":
        (adapter / "bloomft_export.json").unlink()
    line = fail(generate, adapter, "--prompt", "x")
    assert f"{adapter}: an adapter without its base, {base_folder}" in line
    assert line.endswith(f"CONFIG {adapter}")
    assert say(path, adapter).startswith("# Usage")
