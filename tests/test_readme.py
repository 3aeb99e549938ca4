"""What the README shows works as written there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, tmp_path):
    torch.manual_seed(0)
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"folder": tmp_path})


def test_there_are_examples_and_both_commands():
    assert len(EXAMPLES) == 2
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_paths_in_the_readme_exist():
    paths = re.findall(r"\b(?:configs|benchmarks|tests|bloomft|lorakernels)/[\w./-]+\.(?:py|yaml)\b", README)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).is_file(), path
