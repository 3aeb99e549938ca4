"""Imports run one way: benchmarks, tests -> bloomft -> lorakernels, and inside bloomft down its layers."""

import ast
import graphlib
from pathlib import Path

import pytest

import lorakernels
from bloomft.command_line import COMMANDS

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors", "batch", "files", "process", "ranks", "progress", "accounting"),
    ("config",),
    ("data", "model"),
    ("run",),
    ("command_line",),
    ("__init__", *COMMANDS),
    ("__main__",),
)
LAYER = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package's own is called after its ``__init__``."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


KNOWN = modules("bloomft") | modules("lorakernels")


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it, as dotted names with the imported name at the end."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str) -> str:
    """The module that a dotted name is, or is defined in."""
    while name not in KNOWN and f"{name}.__init__" not in KNOWN and "." in name:
        name = name.rpartition(".")[0]
    return name if name in KNOWN else f"{name}.__init__"


def top(name: str) -> str:
    return name.partition(".")[0]


def part(module: str) -> str:
    return module.split(".")[1]


def may_import(ours: str, theirs: str) -> bool:
    """Whether a part of bloomft may import another: from a lower layer, itself, or among the lowest."""
    return LAYER[theirs] < LAYER[ours] or ours == theirs or LAYER[theirs] == LAYER[ours] == 0


def test_every_part_of_bloomft_has_a_layer():
    assert {part(module) for module in modules("bloomft")} == set(LAYER)


def test_the_picture_in_contributing_shows_these_layers():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.partition("```text\n")[2].partition("```")[0]
    rows = [line.partition("#")[0].split() for line in picture.splitlines()]
    ours = rows[rows.index(["bloomft"]) + 1 : rows.index(["|"], rows.index(["bloomft"]))]
    assert [set(row) for row in ours] == [set(layer) for layer in reversed(LAYERS)]


def test_no_module_of_bloomft_imports_from_beside_or_above_its_layer():
    wrong = []
    for module, path in modules("bloomft").items():
        for target in {module_of(name) for name in imports(path) if top(name) == "bloomft"}:
            if not may_import(part(module), part(target)):
                wrong.append(f"{module} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("package", ["bloomft", "lorakernels"])
def test_no_circle(package):
    graph = {}
    for module, path in modules(package).items():
        targets = {module_of(name) for name in imports(path) if top(name) == package}
        graph[module] = targets - {module}
    graphlib.TopologicalSorter(graph).prepare()


def test_lorakernels_imports_nothing_of_bloomft():
    assert [m for m, path in modules("lorakernels").items() if "bloomft" in map(top, imports(path))] == []


def test_bloomft_imports_only_public_names_of_lorakernels():
    public = {f"lorakernels.{name}" for name in lorakernels.__all__}
    used = {
        (module, name)
        for module, path in modules("bloomft").items()
        for name in imports(path)
        if top(name) == "lorakernels"
    }
    assert used
    assert [pair for pair in used if pair[1] not in public] == []


def test_neither_package_imports_tests_or_benchmarks():
    found = {(module, name) for module, path in KNOWN.items() for name in imports(path)}
    assert [pair for pair in found if top(pair[1]) in ("tests", "benchmarks")] == []
