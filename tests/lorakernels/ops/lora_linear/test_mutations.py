"""Kernels and the ATen path broken on purpose, a line each: the check must see it.

Left out are masks without which no result changes: on rows and columns that are never stored, and on the
padding of a rank, which meets zeros. So is the third part of a factor in the thin products: 3e-6 of bfloat16
results, below what the rule allows.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from lorakernels.ops.lora_linear import aten, check, implementations, kernels
from lorakernels.ops.lora_linear import triton as launchers
from lorakernels.ops.lora_linear.reference import keep_mask
from tests.lorakernels.changed_module import changed

DTYPES = (torch.bfloat16, torch.float16)
M, N, K, R = 150, 90, 140, 5  # no multiple of any block, and every sum is split
SHRINK, REDUCE, GEMM, BACKWARD, BACKWARD_A = (
    f"lora_linear_{name}_kernel" for name in ("shrink", "reduce", "forward", "backward", "backward_a")
)
TRITON = {
    "thin K mask": (SHRINK, "k_ok = columns < end - k", "k_ok = columns < end - k + BLOCK_K", {"y", "dB"}),
    "low part of A": (SHRINK, "acc_mid = tl.dot(x, mid, acc_mid)", "", {"y", "dB"}),
    "scale": (REDUCE, "total *= scale\n", "\n", {"y", "dx", "dA", "dB"}),
    "all but the first partial sum": (
        REDUCE, "for index in range(count):", "for index in range(1):", {"y", "dx", "dA", "dB"},
    ),
    "low part of S and dS in the GEMM": (
        REDUCE, "second = low if LAYOUT", "second = high - high if LAYOUT", {"y", "dx"},
    ),
    "low part of B and A in the GEMM": (
        REDUCE, "PACKED_LEFT else low\n", "PACKED_LEFT else low - low\n", {"y", "dx"},
    ),
    "K mask": (GEMM, "tl.where(update, R, K) - k", "tl.where(update, R, K + BLOCK_K) - k", {"y", "dx"}),
    "rank mask": (GEMM, "tl.where(update, R, K) - k", "tl.where(update, R + BLOCK_K, K) - k", {"y", "dx"}),
    "update": (GEMM, "trips = trips_k + tl.cdiv(R, BLOCK_K)", "trips = trips_k", {"y", "dx"}),
    "bias": (GEMM, "    if BIAS:", "    if BIAS and M < 0:", {"y"}),
    "N mask": (BACKWARD, "col_ok = cols < end - n", "col_ok = cols < end - n + BLOCK_N", {"dx", "dA"}),
    "M mask of dB": (BACKWARD, "row_ok = rows < M - first_row", "row_ok = rows < M", {"dB"}),
    "low part of B": (BACKWARD, "acc_mid = tl.dot(dy, mid, acc_mid)", "", {"dx", "dA"}),
    "low parts of S": (
        BACKWARD,
        "db = join_sums(tl.dot(dy_t, s_high), tl.dot(dy_t, s_mid), tl.dot(dy_t, s_low), SHIFT)",
        "db = tl.dot(dy_t, s_high)",
        {"dB"},
    ),
    "M mask of dA": (BACKWARD_A, "row_ok = rows < end - m", "row_ok = rows < M", {"dA"}),
    "low part of dS": (BACKWARD_A, "acc_mid = tl.dot(x_t, mid, acc_mid)", "", {"dA"}),
}  # fmt: skip
DROPOUT = {
    "mask of x": (SHRINK, "x = tl.where(keep, x, 0.0)", "x = tl.where(keep, x, x)", {"y", "dB"}),
    "rank mask": (GEMM, "k_ok = inner < R - k", "k_ok = inner < R - k + BLOCK_K", {"dx"}),
    "mask of the update": (GEMM, "acc = tl.where(keep, acc, 0.0)", "acc = tl.where(keep, acc, acc)", {"dx"}),
    "mask of x in dA": (BACKWARD_A, "x = tl.where(keep, x, 0.0)", "x = tl.where(keep, x, x)", {"dA"}),
}
ATEN = {
    "update of y": ("return _add_product(y, s, lora_b.T), s", "return y, s", {"y"}),
    "update of dx": ("_add_product(dx, ds, lora_a)", "pass", {"dx"}),
    "bias": ("torch.addmm(bias, x, weight.T)", "torch.mm(x, weight.T)", {"y"}),
    "scale of S": (
        "* (problem.scale / (1 - problem.dropout_p))\n\n\ndef thin", "\n\n\ndef thin", {"y", "dB"},
    ),
    "scale of dS": (
        "product(dy, lora_b) * (problem.scale / (1 - problem.dropout_p))", "product(dy, lora_b)",
        {"dx", "dA"},
    ),
    "low part of S and dS": ("(a - a_high).to(out.dtype)", "torch.zeros_like(a_high)", {"y", "dx"}),
    "low part of B and A": ("(b - b_high).to(out.dtype)", "torch.zeros_like(b_high)", {"y", "dx"}),
    "low parts in the thin products": (
        "return high + (mid + low / shift) / shift", "return high", {"y", "dx", "dA", "dB"},
    ),
}  # fmt: skip


def embedded(tensor: torch.Tensor) -> torch.Tensor:
    """tensor within a larger one: what lies beside it must not be zero, or a missing mask would go unseen."""
    wide = torch.full((3 * M, 3 * M), 3.0, dtype=tensor.dtype, device=tensor.device)
    wide[: tensor.shape[0], : tensor.shape[1]] = tensor
    return wide[: tensor.shape[0], : tensor.shape[1]]


@pytest.fixture
def spare_memory(monkeypatch):
    """A kernel that leaves its tensor, as some of these do, stays in memory of its own, which is NaN."""
    shipped = torch.empty

    def empty(*shape, **options):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = torch.Size(shape).numel()
        return shipped(size + 2**16, **options)[:size].view(shape)

    monkeypatch.setattr(torch, "empty", empty)


def make_problem(dtype: torch.dtype, device: str) -> check.Case:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).div(K**0.5)
    problem = check.random_case(M, weight.to(device, dtype), R, torch.float32)
    for name in ("x", "weight", "lora_a", "lora_b", "dy"):
        setattr(problem, name, embedded(getattr(problem, name)))
    return problem


def wrong_results(run, problem: check.Case, *dropout, roundings: int = 1) -> set[str]:
    """The names of those that the check finds wrong; dropout is its probability and seed."""
    multiplier = None
    if dropout:
        dropout_p, seed = dropout
        multiplier = keep_mask(seed, M, K, dropout_p) / (1 - dropout_p)
        problem = replace(problem, dropout_p=dropout_p, seed=seed)
    results = check.run_results(run.forward, run.backward, problem)
    lines = check.failures(results, problem, multiplier, roundings=roundings)
    return {line.split(":")[0].split()[0] for line in lines}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_a_kernel_without_it(name, dtype, tmp_path, monkeypatch, device, spare_memory):
    problem = make_problem(dtype, device)
    assert not wrong_results(launchers, problem)
    kernel, line, replacement, expected = TRITON[name]
    copy = changed(kernels, f"def {kernel}(", line, replacement, tmp_path)
    monkeypatch.setattr(launchers, kernel, getattr(copy, kernel))
    assert wrong_results(launchers, problem) >= expected


@pytest.mark.parametrize("name", DROPOUT)
def test_a_kernel_with_dropout_without_it(name, tmp_path, monkeypatch, device, spare_memory):
    problem, dropout = make_problem(torch.bfloat16, device), (0.4, torch.tensor([7], device=device))
    assert not wrong_results(launchers, problem, *dropout)
    kernel, line, replacement, expected = DROPOUT[name]
    copy = changed(kernels, f"def {kernel}(", line, replacement, tmp_path)
    monkeypatch.setattr(launchers, kernel, getattr(copy, kernel))
    assert wrong_results(launchers, problem, *dropout) >= expected


@pytest.mark.parametrize(("dtype", "name"), list(itertools.product(DTYPES, ATEN)), ids=str)
def test_the_aten_path_without_it(dtype, name, tmp_path, device):
    problem, roundings = make_problem(dtype, device), implementations.ATEN.roundings
    # the path of CUDA tensors, whose 16-bit products into float32 a CPU lacks
    on_cpu = (
        ("if a.is_cuda:", "if True:"),
        ("torch.mm(a, b, out_dtype=torch.float32)", "torch.mm(a.float(), b.float())"),
        (
            "torch.mm(a, torch.cat([high, mid, low], 1), out_dtype=torch.float32)",
            "torch.mm(a.float(), torch.cat([high, mid, low], 1).float())",
        ),
    )
    assert not wrong_results(changed(aten, "", "", "", tmp_path, on_cpu), problem, roundings=roundings)
    line, replacement, expected = ATEN[name]
    copy = changed(aten, "", line, replacement, tmp_path, on_cpu)
    assert wrong_results(copy, problem, roundings=roundings) == expected
