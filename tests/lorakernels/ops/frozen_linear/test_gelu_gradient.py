"""The kernel of the gradient through GELU against float64, in every layout, and with a line of it broken."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, linear

pytest.importorskip("triton")
from lorakernels.ops.frozen_linear import aten, check, reference, triton
from lorakernels.ops.frozen_linear.implementations import fused
from lorakernels.ops.frozen_linear.reference import Problem
from lorakernels.ops.lora_linear.triton import tma_gemm
from lorakernels.ops.lora_linear.triton.tiles import Tile
from lorakernels.tolerance import relative_error
from tests.lorakernels.changed_module import changed

# small, so that small problems have several tiles in each direction
TILE = Tile(32, 64, 32, 4, 2)
DTYPES = (torch.bfloat16, torch.float16)
M, N, K = 70, 136, 152  # no multiples of the tile; rows are aligned, as TMA wants them


def make_problem(
    m: int = M, n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16, *, device: str, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / n**0.5
    return check.random_problem(m, weight.to(device, dtype), seed=seed)


def autograd_gradient(problem: Problem) -> torch.Tensor:
    """In float64, by torch."""
    dy, weight, x = (one.detach().double() for one in problem)
    y = linear(gelu(x.requires_grad_(), approximate="tanh"), weight)
    return torch.autograd.grad(y, x, dy)[0]


def failures(problem: Problem, tile: Tile = TILE) -> list[str]:
    dx = triton.backward(*problem, tile=tile)
    return check.failures(dx, problem, exact=autograd_gradient(problem))


def test_the_definition_is_torchs(monkeypatch, device):
    monkeypatch.setattr(check, "BLOCK_ROWS", 32)
    problem = make_problem(device=device)
    exact = autograd_gradient(problem)
    assert relative_error(check.exact_gradient(problem), exact) < 1e-14
    wide = Problem(*(one.double() for one in problem))
    for backward in (reference.backward, aten.backward):
        assert relative_error(backward(*wide), exact) < 1e-14


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    m=st.integers(1, 150), n=st.integers(1, 20), k=st.integers(1, 20), dtype=st.sampled_from(DTYPES),
    by_columns=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_aligned_problem(device, m, n, k, dtype, by_columns, seed):
    problem = make_problem(m, 8 * n, 8 * k, dtype, device=device, seed=seed)
    if by_columns:
        problem = problem._replace(weight=problem.weight.T.contiguous().T)
    assert failures(problem) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shipped_tile(dtype, device):
    problem = make_problem(150, 80, 264, dtype, device=device)
    offered = fused(problem)
    assert offered
    for one in offered:
        assert check.failures(one.backward(*problem), problem, roundings=one.roundings) == []


def odd_address(tensor: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "columns": lambda one: one.T.contiguous().T,
    "every second": lambda one: torch.stack([one, one * 0 + 9], 2)[..., 0],
    "within a larger one": lambda one: torch.cat([one, one * 0 + 9], 1)[:, : one.shape[1]],
    "odd stride": lambda one: torch.cat([one, one[:, :1]], 1)[:, :-1],
    "odd address": odd_address,
    "one row expanded": lambda one: one[:1].expand_as(one),
    "one number expanded": lambda one: one[:1, :1].expand_as(one),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["dy", "x"])
def test_layouts(which, layout, device):
    problem = make_problem(device=device)
    given = LAYOUTS[layout](getattr(problem, which))
    assert failures(problem._replace(**{which: given})) == []


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 1e4])
def test_where_the_derivative_is_flat_or_half(size, device):
    problem = make_problem(device=device)
    problem = problem._replace(x=problem.x * size)
    assert failures(problem) == []


LINES = {
    "the derivative of the left half": ("left_half *= gelu", "left_half += 0 * gelu"),
    "the derivative of the right half": ("right_half *= gelu", "right_half += 0 * gelu"),
    "columns of the right half": ("col += BLOCK_N // 2", "col += 0"),
    "rows of x": ("gelu_input_desc.load([row, col])", "gelu_input_desc.load([0, col])"),
    "one rounding": ("tl.reshape(acc, (", "tl.reshape(acc.to(y_desc.dtype).to(tl.float32), ("),
    "x³ in the tanh": ("(1.0 + square * CUBIC)", "1.0"),
    "x³ outside the tanh": ("(1.0 + 3.0 * (square * CUBIC))", "1.0"),
    "the derivative of the tanh": (" * (1.0 - sigmoid)", " * (1.0 - sigmoid * sigmoid)"),
    "the last trip of K": ("for trip in range(trips_k):", "for trip in range(trips_k - 1):"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_the_kernel_without_it(name, dtype, monkeypatch, tmp_path, device):
    problem = make_problem(dtype=dtype, device=device)
    assert failures(problem) == []
    monkeypatch.setattr(triton, "tma_gemm", changed(tma_gemm, "def gelu_derivative", *LINES[name], tmp_path))
    assert failures(problem)
