"""How many threads a command starts, and how long they spin."""

import os
import subprocess
import sys

import pytest

from bloomft import process as threads

PRINT = """
import os
from bloomft.process import share_cores
share_cores()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def run(code, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=variables | environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_user_decides_how_long_threads_spin():
    assert run(PRINT).strip() == str(threads.SPIN_COUNT)
    assert run(PRINT, GOMP_SPINCOUNT="7").strip() == "7"
    assert run(PRINT, OMP_WAIT_POLICY="ACTIVE").strip() == "None"


@pytest.mark.parametrize("command", ["train", "export", "generate", "demo"])
def test_every_command_decides_before_torch_is_imported(command):
    """libgomp reads the variable when torch loads it: what it holds then is what counts."""
    code = f"""
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            raise SystemExit
sys.meta_path.insert(0, Watch())
sys.argv = ["{command}"]
runpy.run_module("bloomft.{command}", run_name="__main__")
"""
    assert run(code).strip() == str(threads.SPIN_COUNT)


def test_importing_the_package_changes_nothing():
    code = "import os; before = dict(os.environ); import bloomft.model.patch; assert os.environ == before"
    run(code)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "nonsense"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_quotas_of_both_versions_of_cgroups(tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads._quota(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_no_more_threads_than_usable_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(8)\n"
        "from bloomft.process import setup_process; setup_process(); print(torch.get_num_threads())"
    )
    assert run(code).strip() == "1"
