"""The sdist, the wheel that is made of it, and that wheel at work outside of the project's folder."""

import json
import re
import shutil
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import bloomft
from tests.bloomft.conftest import save_tiny_base
from tests.bloomft.python_process import finish, run_python, start_python

ROOT = Path(__file__).parents[1]
INFO = f"bloomft-{bloomft.__version__}.dist-info"
PACKAGES = ("bloomft", "lorakernels")
# what a checkout may hold beside the project's own files
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "shared")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--isolated")
OFFLINE = ("--no-deps", "--no-index")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT, symlinks=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run_python("-c", build, cwd=folder / "source", PYTHONPATH="")
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_python(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, sdist, PYTHONPATH="")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder into which the wheel is installed, the only place of the packages in the tests below."""
    folder = tmp_path_factory.mktemp("installed")
    run_python(*PIP, "install", *OFFLINE, "--target", folder, wheel, PYTHONPATH="")
    return folder


@pytest.fixture
def bloomft_command(installed, tmp_path):
    """Runs the installed ``bloomft`` in an empty folder; returns exit status, output and errors."""

    def bloomft_command(*arguments: str) -> tuple[int, str, str]:
        script = installed / "bin" / "bloomft"
        return finish(start_python(script, *arguments, cwd=tmp_path, PYTHONPATH=str(installed)))

    return bloomft_command


def files_of(*folders: str) -> set[str]:
    """The files below folders of the project, without what Python compiled."""
    found = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_the_sdist_is_the_whole_project(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folders = (*PACKAGES, "tests", "benchmarks", "configs", "docs", "examples", "pretraining")
    assert files_of(*folders) - names == set()
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"} <= names
    assert [name for name in names if "__pycache__" in name] == []


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    shipped = {f"bloomft/{name}": (ROOT / name).read_bytes() for name in files_of("configs")}
    assert {name for name in contents if not name.startswith(INFO)} == files_of(*PACKAGES) | set(shipped)
    assert {name: contents[name] for name in shipped} == shipped
    assert {"bloomft/py.typed", "lorakernels/py.typed", "bloomft/configs/bloom-tiny.yaml"} <= set(contents)
    assert contents[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_s_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = HeaderParser().parsestr(archive.read(f"{INFO}/METADATA").decode())
        entry_points = archive.read(f"{INFO}/entry_points.txt").decode()
    assert metadata["Version"] == bloomft.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "bloomft = bloomft.__main__:run" in entry_points


def test_the_changelog_has_an_entry_for_this_version():
    assert f"\n## [{bloomft.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md"])
def test_what_a_document_links_to_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    paths = re.findall(r"`((?:lorakernels|bloomft|benchmarks|tests|configs)/[\w./]*)`", text)
    assert [path for path in links + paths if not (ROOT / path).exists()] == []


def test_the_installed_packages_are_those_of_the_wheel(installed, tmp_path):
    code = "import bloomft, lorakernels; print(bloomft.__file__, lorakernels.__file__, sep='\\n')"
    places = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert places == [str(installed / package / "__init__.py") for package in PACKAGES]


def test_the_installed_command_says_its_version(bloomft_command):
    assert bloomft_command("--version") == (0, f"bloomft {bloomft.__version__}\n", "")


def test_training_with_a_shipped_configuration_on_the_examples(bloomft_command, installed, tmp_path):
    save_tiny_base(tmp_path / "base")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    status, _, errors = bloomft_command(
        "train", "configs/bloom-560m.yaml",
        f"model.transformer.pretrained_model_name_or_path={tmp_path / 'base'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_length=128", "train.batch_size=2", "train.device=cpu", "train.log_every_n_steps=1",
        "optim.scheduler.num_warmup_steps=0", "optim.scheduler.num_training_steps=2",
    )  # fmt: skip
    assert status == 0, errors
    assert f"using the one shipped with bloomft, {installed / 'bloomft/configs/bloom-560m.yaml'}" in errors
    lines = (tmp_path / "runs/bloom-560m/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "eval_loss" in json.loads(lines[-1])
    assert (tmp_path / "runs/bloom-560m/last.ckpt").is_file()


def test_the_demo_in_an_empty_folder(bloomft_command, tmp_path, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    save_tiny_base(base)
    status, output, errors = bloomft_command(
        "demo",
        f"model.transformer.pretrained_model_name_or_path={base}",
        f"data.filenames={ROOT / 'examples'}/*.txt", f"data.cache_dir={base / 'cache'}",
        "data.max_length=64", "train.batch_size=2", "train.device=cpu",
        "optim.scheduler.num_warmup_steps=0", "optim.scheduler.num_training_steps=2",
    )  # fmt: skip
    assert status == 0, errors
    assert errors.startswith("configs/bloom-tiny.yaml: not found here; using the one shipped with bloomft, ")
    assert [
        words for words in ("the base writes", "after fine-tuning", "perplexity") if words not in output
    ] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
