"""Kernels broken on purpose, one line each: the tests' own rule must see it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lorakernels.ops.lora_linear import check, kernels
from lorakernels.ops.lora_linear import triton as launchers

MUTATIONS = {
    "no mask on K": (
        "lora_linear_forward_kernel",
        "k_ok = inner < tl.where(update, R, K) - k",
        "k_ok = inner < tl.where(update, R, K + BLOCK_K) - k",
        {"y", "dx"},
    ),
    "no update": (
        "lora_linear_forward_kernel",
        "trips = trips_k + tl.cdiv(R, BLOCK_K)",
        "trips = trips_k",
        {"y", "dx"},
    ),
    "no bias": ("lora_linear_forward_kernel", "    if BIAS:", "    if BIAS and M < 0:", {"y"}),
    "no scale": ("lora_linear_reduce_kernel", "    total *= scale\n", "", {"y", "dx", "dA", "dB"}),
    "first partial sum alone": (
        "lora_linear_reduce_kernel",
        "for index in range(count):",
        "for index in range(1):",
        {"y", "dx", "dA", "dB"},
    ),
    "no mask on M": ("lora_linear_backward_a_kernel", "row_ok = rows < end - m", "row_ok = rows < M", {"dA"}),
    "S in 16 bits": (
        "lora_linear_backward_kernel",
        "db = join_sums(tl.dot(dy_t, s_high), tl.dot(dy_t, s_mid), tl.dot(dy_t, s_low), SHIFT)",
        "db = tl.dot(dy_t, s_high)",
        {"dB"},
    ),
}


def mutated(kernel: str, line: str, replacement: str, folder: Path):
    """That kernel from a copy of the source with the line replaced, within the kernel alone."""
    source = Path(kernels.__file__).read_text()
    start = source.index(f"def {kernel}(")
    assert line in source[start:], f"{line!r} is no longer in {kernel}: update the mutation"
    source = source[:start] + source[start:].replace(line, replacement, 1)
    path = folder / "mutated_kernels.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("mutated_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutated_kernels"] = module
    spec.loader.exec_module(module)
    return getattr(module, kernel)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_turns_the_check_red(name, tmp_path, monkeypatch, device):
    # sizes that are no multiple of any block, and enough of them that every sum is split
    weight = torch.randn(90, 140, device=device).div(140**0.5)
    problem = check.random_problem(150, weight.bfloat16(), 5, torch.float32)
    # what lies behind x's last column must not be zero, or a missing mask would go unseen
    padded = torch.full((150, 300), 3.0, device=device, dtype=torch.bfloat16)
    padded[:, :140] = problem.x
    problem.x = padded[:, :140]
    problem.dy = torch.cat([problem.dy, problem.dy], 1)[:, :90]
    wide_weight = torch.full((300, 300), 3.0, device=device, dtype=torch.bfloat16)
    wide_weight[:90, :140] = problem.weight
    problem.weight = wide_weight[:90, :140]
    run = launchers.forward, launchers.backward
    assert check.failures(check.run_results(*run, problem), problem) == []
    kernel, line, replacement, expected = MUTATIONS[name]
    monkeypatch.setattr(launchers, kernel, mutated(kernel, line, replacement, tmp_path))
    wrong = {text.split(":")[0] for text in check.failures(check.run_results(*run, problem), problem)}
    assert wrong >= expected
