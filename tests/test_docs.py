"""README.md and docs/: links resolve, code runs as written, lists and tables are those of the program."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bloomft.command_line import COMMANDS
from bloomft.config.loading import load_config
from bloomft.config.schema import reference_table
from tests.bloomft.conftest import SENTENCES, _process_settings, base_folder, command  # noqa: F401  # fixtures

ROOT = Path(__file__).parents[1]
README, RELIABILITY = ROOT / "README.md", ROOT / "docs" / "reliability.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
COMMIT = "0123456789012345678901234567890123456789"
HUB_NAME = "bigscience/bloom-560m"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass
class Block:
    """A fenced block of code; ``reason`` says why it is not run, if it is not."""

    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found["language"], found["code"], found["reason"]) for found in FENCE.finditer(text)]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def yaml_files(page: Path) -> dict[str, str]:
    """The configurations of a page: blocks of YAML that begin with ``# <name>.yaml``."""
    codes = [block.code for block in blocks(page) if block.language == "yaml"]
    return {re.match(r"# (\S+\.yaml)\n", code)[1]: code for code in codes}


@pytest.fixture
def folder(tmp_path, base_folder, monkeypatch) -> Path:  # noqa: F811
    """Where a reader works: texts, the configurations of the pages, the commands on PATH.

    A small BLOOM takes the place of the published weights in the hub's download cache; the network is off.
    """
    work, home, programs = tmp_path / "work", tmp_path / "hub", tmp_path / "bin"
    for path in (work / "texts", programs, home / "hub"):
        path.mkdir(parents=True)
    for index in range(20):
        text = " ".join(SENTENCES[(index + j) % len(SENTENCES)] for j in range(1 + index % 4))
        (work / "texts" / f"{index}.md").write_text(f"# Package {index}\n\n{text}\n")
    for page in PAGES:
        for name, code in yaml_files(page).items():
            (work / name).write_text(code)
    repository = home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(base_folder)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    for name, value in {
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.chdir(work)
    return work


def run_shell(code: str, command) -> None:  # noqa: F811
    """Plain commands of bloomft alone run in this process, which saves their start; other blocks in bash."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    plain = re.compile(rf"python -m bloomft\.({'|'.join(COMMANDS)})( [^|&;<>*?$`(){{}}~]*)?")
    if all(plain.fullmatch(" ".join(words)) for words in lines):
        for _, _, module, *words in lines:
            status, output, errors = command(importlib.import_module(module), *words)
            assert status == 0, f"{module} {words}\n{output}\n{errors}"
    else:
        run_bash(code)


def run_bash(code: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@each_page
def test_code_runs_in_the_order_of_the_page(page, folder, command):  # noqa: F811
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    run = [block for block in blocks(page) if block.reason is None]
    for number, block in enumerate(run):
        if block.language == "python":
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), namespace)
        elif block.language == "bash":
            run_shell(block.code, command)
        else:
            assert block.language == "yaml", f"{page.name}: {block.language} is neither run nor read"
    named = re.findall(r"\bruns/[\w./-]*\w", "".join(block.code for block in run))
    assert [name for name in named if not (folder / name).exists()] == []


@each_page
def test_yaml_files_are_valid_configurations(page, tmp_path):
    for name, code in yaml_files(page).items():
        (tmp_path / name).write_text(code)
        load_config(tmp_path / name, [])


@each_page
def test_links_resolve(page):
    assert broken_links(page) == []


@each_page
def test_named_paths_exist(page):
    pattern = r"(?<![\w/.-])(?:configs|benchmarks|tests|bloomft|lorakernels|docs)/[\w./-]*[\w/]"
    missing = [name for name in re.findall(pattern, page.read_text("utf-8")) if not (ROOT / name).exists()]
    assert missing == []


@each_page
def test_make_targets_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for module in re.findall(r"python -m ((?:bloomft|lorakernels|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


def test_the_table_of_keys_is_that_of_the_program():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    begin, end = "<!-- keys: python -m bloomft.config -->\n", "\n<!-- end of keys -->"
    assert text.partition(begin)[2].partition(end)[0] == reference_table()


def test_every_promise_names_a_test_of_its_section():
    sections = RELIABILITY.read_text(encoding="utf-8").split("\n## ")[1:]
    for section in sections:
        files = [RELIABILITY.parent / name for name in re.findall(r"\]\((\S+?\.py)\)", section)]
        functions = set(re.findall(r"^def (test_\w+)", "\n".join(map(Path.read_text, files)), flags=re.M))
        rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
        assert rows
        for row in rows:
            name = re.fullmatch(r"\| .+ \| `(test_\w+)` \|", row)
            assert name is not None, row
            assert name[1] in functions, row


def test_tests_named_elsewhere_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", prose(page)):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


def test_messages_in_troubleshooting_are_those_of_the_program():
    texts = set()
    for path in (ROOT / "bloomft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 40
    unknown = [
        part
        for message in messages
        for part in message.split("...")
        if part.strip() and not any(part.strip() in text for text in texts)
    ]
    assert unknown == []
