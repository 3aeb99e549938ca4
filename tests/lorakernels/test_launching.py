"""The one way to launch: compiling ahead compiles all kernels at once and launches none of them."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from lorakernels.launching import compiling, launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What `compiled_ahead` saw, by phase."""
    command = [sys.executable, "-m", "tests.lorakernels.compiled_ahead"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_ahead_every_kernel_is_compiled_once_all_at_once_and_none_is_launched(found):
    """They wait for each other while they are compiled: one after another would break the barrier."""
    ahead = found["ahead"]
    assert ahead["compiled"] == ["broken_kernel", "scale_kernel", "scale_kernel"]
    assert ahead["launched"] == 0
    first, error, last = ahead["lines"]
    assert first == "compiling 3 kernels for a problem"
    assert re.match(r"a kernel does not compile: Compil\w+: ", error)
    assert re.fullmatch(r"compiled in \d+\.\d s", last)


def test_what_is_compiled_is_neither_compiled_again_nor_logged(found):
    assert found["again"] == {"compiled": [], "launched": 0, "lines": [], "error": ""}
    assert found["launched"] == {"compiled": [], "launched": 2, "lines": [], "error": ""}


def test_the_launch_meets_the_compilers_error_again(found):
    broken = found["broken"]
    assert (broken["launched"], broken["lines"]) == (0, [])
    assert broken["error"]


class Kernel:
    """Notes what Triton is asked for."""

    def __init__(self):
        self.asked = []

    def warmup(self, *arguments, **options):
        self.asked.append(("warmup", arguments, options))

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.asked.append((grid, arguments, options))


def test_a_kernel_is_launched_outside_and_after_the_block():
    kernel = Kernel()
    launch(kernel, (3,), 1, 2, BLOCK=16)
    with contextlib.suppress(ZeroDivisionError), compiling("a problem"):
        launch(kernel, (3,), 1, 2, BLOCK=16)
        raise ZeroDivisionError
    launch(kernel, (3,), 1, 2, BLOCK=16)
    launched = ((3,), (1, 2), {"BLOCK": 16})
    assert kernel.asked == [launched, ("warmup", (1, 2), {"grid": (3,), "BLOCK": 16}), launched]


def test_an_operator_launches_nothing_while_its_kernels_are_compiled(monkeypatch, device):
    from lorakernels.ops.linear_cross_entropy import triton as operator

    kernels = {}
    for name in ("linear_cross_entropy_forward_kernel", "linear_cross_entropy_backward_kernel"):
        kernels[name] = Kernel()
        monkeypatch.setattr(operator, name, kernels[name])
    hidden, weight = torch.randn(6, 16, device=device), torch.randn(30, 16, device=device)
    labels = torch.arange(6, device=device)
    with compiling("the loss"):
        losses, statistics, _ = operator.forward(hidden, weight, labels, True)
        operator.weight_gradient(hidden, weight, labels, losses, statistics, losses)
    assert [[ask[0] for ask in kernel.asked] for kernel in kernels.values()] == [["warmup"], ["warmup"]]
