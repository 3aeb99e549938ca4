"""What the tests stand on: memory that is NaN until it is written, and skips where no kernel can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_empty_memory_is_nan(dtype, requires_grad, device):
    tensor = torch.empty(3, dtype=dtype, device=device, requires_grad=requires_grad)
    assert tensor.isnan().all()
    assert tensor.is_leaf
    assert tensor.requires_grad == requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="there kernels run without the interpreter")
def test_without_interpreter_and_gpu_launches_are_skipped():
    tests = ("test_interpreter_bfloat16.py", "test_modules.py::test_parts_change_the_chosen_rows_alone")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/lorakernels/{test}" for test in tests]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "launches a Triton kernel: needs a CUDA device, or TRITON_INTERPRET=1" in done.stdout
    # the six of the first file and the five of 15 that name Triton
    assert "10 passed, 11 skipped" in done.stdout
