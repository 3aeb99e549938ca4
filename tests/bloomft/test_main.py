"""The ``bloomft`` command: the commands under one name."""

import pytest

import bloomft
import bloomft.__main__ as main_module
from bloomft import export, generate
from bloomft.command_line import COMMANDS
from tests.bloomft.python_process import finish, run_python, start_python


@pytest.mark.parametrize("words", [["--help"], ["-h"], []], ids=" ".join)
def test_help_names_every_command(words):
    output = run_python("-m", "bloomft", *words)
    listed, _, examples = output.partition("to begin with:")
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert "\n  bloomft train configs/" in examples
    assert max(map(len, output.splitlines())) <= 80


def test_version_is_that_of_the_package():
    assert run_python("-m", "bloomft", "--version") == f"bloomft {bloomft.__version__}\n"


def test_an_unknown_command_is_the_user_s_mistake():
    status, output, errors = finish(start_python("-m", "bloomft", "trian", "run.yaml"))
    assert (status, output) == (2, "")
    assert errors == "error: bloomft: no command 'trian'; did you mean train?\n"


def test_a_name_like_no_command_is_answered_with_all_of_them(fail):
    names = ", ".join(COMMANDS)
    assert fail(main_module, "xyz") == f"error: bloomft: no command 'xyz'; the commands are {names}"


@pytest.mark.parametrize("module", [export, generate])
def test_what_follows_the_name_is_the_command_s_own(command, module):
    name = module.__name__.removeprefix("bloomft.")
    for words in (["--help"], [], ["run.yaml", "--no-such-option"]):
        assert command(main_module, name, *words) == command(module, *words)
    assert command(main_module, name, "--help")[0] == 0
