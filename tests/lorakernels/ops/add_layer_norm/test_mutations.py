"""The kernels broken on purpose, a line each: the check must see it."""

import pytest
import torch

from lorakernels.ops.add_layer_norm import aten, check, triton
from tests.lorakernels.changed_module import changed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
M, K = 50, 700
LINES = {
    "the residual": ("(x + residual)", "(x + 0 * residual)", {"t"}),
    "rounding of the sum": ("t = rounded.to(tl.float32)", "t = x + residual", {"h", "mean, rstd"}),
    "column mask of the variance": ("tl.where(ok, t - mean, 0.0)", "t - mean", {"h", "mean, rstd"}),
    "mean of the row": ("tl.sum(t, 0) / K", "tl.sum(t, 0) / BLOCK_K", {"h", "mean, rstd"}),
    "variance of the row": ("centred, 0) / K", "centred, 0) / BLOCK_K", {"h", "mean, rstd"}),
    "the mean that is kept": ("mean_ptr + row, mean)", "mean_ptr + row, 1.01 * mean)", {"mean, rstd"}),
    "the rstd that is kept": ("rstd_ptr + row, rstd)", "rstd_ptr + row, 1.01 * rstd)", {"mean, rstd"}),
    "weight": ("centred * rstd * weight + bias", "centred * rstd + bias", {"h"}),
    "bias": ("centred * rstd * weight + bias", "centred * rstd * weight", {"h"}),
    "strides of x": ("x_ptr + row * stride_xm", "x_ptr + row * stride_tm", {"t"}),
    "strides of the residual": ("row * stride_residual_m", "row * stride_tm", {"t"}),
}  # fmt: skip
BACKWARD_LINES = {
    "weight": ("g = dh * tl.load", "g = dh + 0 * tl.load"),
    "mean": ("(x - mean) * rstd", "x * rstd"),
    "mean of g": (" - tl.sum(g, 0) / K", ""),
    "what lies along the normed row": (" - normed * along", ""),
    "columns of that": ("tl.sum(g * normed, 0) / K", "tl.sum(g * normed, 0) / BLOCK_K"),
    "rstd": ("- normed * along) * rstd", "- normed * along)"),
    "what is added": ("if ADD:", "if not ADD:"),
    "strides of dh": ("row * stride_dhm", "row * stride_dxm"),
    "strides of x": ("row * stride_xm", "row * stride_dxm"),
    "strides of dt": ("row * stride_dtm", "row * stride_dxm"),
}


def within_threes(tensor: torch.Tensor) -> torch.Tensor:
    """tensor [M, K] in wider rows, whose other elements are 3: a wrong stride or a missing mask is seen."""
    wide = torch.full((M, 2 * K), 3.0, dtype=tensor.dtype, device=tensor.device)
    wide[:, :K] = tensor
    return wide[:, :K]


def wrong(run, problem: check.Problem) -> set[str]:
    return {line.split(":")[0] for line in check.failures(run.forward(problem), problem)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_the_forward_kernel_without_it(name, dtype, device, tmp_path):
    problem = check.random_problem(M, K, dtype, device)
    problem.x, problem.residual = within_threes(problem.x), within_threes(problem.residual)
    assert wrong(triton, problem) == set()
    line, replacement, expected = LINES[name]
    copy = changed(triton, "def add_layer_norm_forward_kernel", line, replacement, tmp_path)
    if name == "rounding of the sum" and dtype == torch.float32:
        expected = set()  # nothing is rounded
    assert wrong(copy, problem) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BACKWARD_LINES)
def test_the_backward_kernel_without_it(name, dtype, device, tmp_path):
    problem = check.random_backward_problem(M, K, dtype, device)
    for one in ("dh", "x", "dt"):
        setattr(problem, one, within_threes(getattr(problem, one)))
    assert check.backward_failures(triton.backward(problem), problem) == []
    copy = changed(triton, "def add_layer_norm_backward_kernel", *BACKWARD_LINES[name], tmp_path)
    assert check.backward_failures(copy.backward(problem), problem) != []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_16_bits_are_seen(dtype, monkeypatch):
    """Those that torch keeps on a CPU for parameters in 16 bits."""
    problem = check.random_problem(M, K, dtype, "cpu")
    monkeypatch.setattr(aten, "_parameter", lambda one: one)
    assert wrong(aten, problem) == {"mean, rstd", "mean", "rstd"}
