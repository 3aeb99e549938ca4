"""How many threads a command starts, how long they spin, and what of freed memory goes back."""

import os
import sys

import pytest
import torch

from benchmarks import process_memory
from bloomft import process
from bloomft.command_line import COMMANDS
from bloomft.errors import UserError
from bloomft.process import pick_device, release_freed_memory, setup_process
from tests.bloomft.python_process import run_python

PRINT = """
import os
from bloomft.process import share_cores
share_cores()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def test_the_user_decides_how_long_threads_spin():
    assert run_python("-c", PRINT).strip() == str(process.SPIN_COUNT)
    assert run_python("-c", PRINT, GOMP_SPINCOUNT="7").strip() == "7"
    assert run_python("-c", PRINT, OMP_WAIT_POLICY="ACTIVE").strip() == "None"


WATCH = """
import os, runpy, signal, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)
            raise SystemExit

sys.meta_path.insert(0, Watch())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
"""
WITH_TORCH = [command for command in COMMANDS if command != "cache"]
PROGRAMS = [[f"bloomft.{command}"] for command in WITH_TORCH] + [["bloomft", name] for name in WITH_TORCH]


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_what_every_command_has_set_when_torch_is_imported(program):
    """libgomp reads the variable when torch loads it, and that takes seconds in which a signal may come."""
    spins, watches = run_python("-c", WATCH, *program).split()
    assert spins == str(process.SPIN_COUNT)
    assert watches == str(program[-1].endswith("train"))


@pytest.mark.parametrize("program", [["bloomft.cache"], ["bloomft", "cache"]], ids=" ".join)
def test_the_cache_is_listed_without_torch(program, tmp_path):
    assert run_python("-c", WATCH, *program, XDG_CACHE_HOME=str(tmp_path)).startswith("0 in ")


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
    assert process._quota(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_no_more_threads_than_usable_cores():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(8)\n"
        "from bloomft.process import setup_process; setup_process(); print(torch.get_num_threads())"
    )
    assert run_python("-c", code).strip() == "1"


def freed_blocks_still_resident() -> tuple[int, int]:
    """Bytes of freed blocks that glibc keeps between used ones, and what is left of them after a release."""
    setup_process()
    before = process_memory.resident()
    blocks = [torch.ones(2**18) for _ in range(128)]  # 1 MiB each
    used = blocks[1::2]
    del blocks
    kept = process_memory.resident() - before - sum(block.nbytes for block in used)
    release_freed_memory()
    return kept, process_memory.resident() - before - sum(block.nbytes for block in used)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back():
    kept, left = process_memory.in_fresh_process(freed_blocks_still_resident)
    assert kept > 48 * 2**20
    assert left < 16 * 2**20


def test_each_launched_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2"):
        pick_device("cuda")
