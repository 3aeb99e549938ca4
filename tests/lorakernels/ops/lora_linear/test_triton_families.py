"""Every family of Triton GEMMs against float64, on problems that it is offered for, and what it is not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from lorakernels.ops.lora_linear import check, triton
from lorakernels.ops.lora_linear.implementations import is_aligned
from lorakernels.ops.lora_linear.reference import keep_mask
from lorakernels.ops.lora_linear.triton import tma_gemm
from lorakernels.ops.lora_linear.triton.tiles import (
    VENDOR,
    Chip,
    Family,
    Gemm,
    Tile,
    default_gemm,
    shipped_gemms,
)
from lorakernels.tolerance import deviations

# small, so that small problems have several tiles in each direction
GEMMS = {
    "tma": Gemm(Family.TMA, Tile(32, 64, 32, 4, 2)),
    "pointer": Gemm(Family.POINTER, Tile(32, 64, 32, 4, 2)),
    "vendor": VENDOR,
}
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
A100, H100, MI300X = Chip(8, 163 * 1024), Chip(9, 227 * 1024), Chip(0, 64 * 1024)


def make_problem(m, n, k, r, dtypes, device, *, bias=True, transposed=False, seed=0) -> check.Case:
    dtype, adapter_dtype = DTYPES[dtypes]
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
    if transposed:
        weight = weight.T.contiguous().T
    return check.random_case(m, weight, r, adapter_dtype, bias=bias, seed=seed)


def failures(problem: check.Case, gemm: Gemm, multiplier: torch.Tensor | None = None) -> list[str]:
    y, s = triton.forward(problem, gemm=gemm)
    gradients = triton.backward(problem, problem.dy, s, (True, True, True), gemm=gemm)
    roundings = 2 if gemm.family is Family.VENDOR else 1
    return check.failures([y, *gradients], problem, multiplier, roundings=roundings)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("family", GEMMS)
def test_dtypes(family, dtypes, device):
    assert failures(make_problem(70, 136, 72, 20, dtypes, device), GEMMS[family]) == []


@pytest.mark.parametrize("rank", [1, 8, 17, 64, 128])
@pytest.mark.parametrize("family", GEMMS)
def test_ranks(family, rank, device):
    dtypes = "bf16-fp32"
    problem = make_problem(70, 136, 72, rank, dtypes, device)
    assert tma_gemm.addressable(problem.x, problem.weight)
    assert failures(problem, GEMMS[family]) == []


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    family=st.sampled_from(list(GEMMS)), m=st.integers(4, 150), n=st.integers(1, 20), k=st.integers(1, 20),
    r=st.integers(4, 40), dtypes=st.sampled_from(list(DTYPES)), bias=st.booleans(), transposed=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_aligned_problem(device, family, n, k, **drawn):
    assert failures(make_problem(n=8 * n, k=8 * k, device=device, **drawn), GEMMS[family]) == []


@pytest.mark.parametrize("family", ["tma", "pointer"])
@pytest.mark.parametrize("transposed", [False, True])
def test_dropout(family, transposed, device):
    m, k, dropout_p, seed = 70, 72, 0.3, torch.tensor([11], device=device)
    problem = make_problem(m, 136, k, 8, "bf16-fp32", device, transposed=transposed)
    problem = replace(problem, dropout_p=dropout_p, seed=seed)
    multiplier = keep_mask(seed, m, k, dropout_p) / (1 - dropout_p)
    assert failures(problem, GEMMS[family], multiplier) == []


def test_the_vendors_gemm_refuses_the_mask_of_dx(device):
    """Forward, where x is masked before S is made, and gradients without dx are computed."""
    problem = make_problem(70, 136, 72, 8, "bf16-fp32", device)
    problem = replace(problem, dropout_p=0.3, seed=torch.tensor([11], device=device))
    y, s = triton.forward(problem, gemm=VENDOR)
    assert y.shape == (70, 136)
    dx, *_ = triton.backward(problem, problem.dy, s, (False, True, True), gemm=VENDOR)
    assert dx is None
    with pytest.raises(ValueError, match="gemm: the vendor's cannot mask"):
        triton.backward(problem, problem.dy, s, (True, True, True), gemm=VENDOR)


@pytest.mark.parametrize("layout", ["odd width", "odd stride", "odd address", "columns"])
def test_what_tma_cannot_address_is_computed_by_pointers(layout, device):
    problem = make_problem(40, 136, 71 if layout == "odd width" else 72, 8, "bf16-fp32", device)
    x = problem.x
    if layout == "odd stride":
        problem.x = torch.cat([x, x[:, :1]], 1)[:, :-1]
    elif layout == "odd address":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
        problem.x = memory[1:].view(x.shape).copy_(x)
    elif layout == "columns":
        problem.x = x.T.contiguous().T
    assert not tma_gemm.addressable(problem.x, problem.weight)
    assert failures(problem, GEMMS["tma"]) == []


def test_gradients_that_are_not_needed(device):
    problem = make_problem(40, 136, 72, 8, "bf16-fp32", device)
    _, s = triton.forward(problem)
    every = triton.backward(problem, problem.dy, s, (True, True, True))
    for index in range(3):
        needs = tuple(one == index for one in range(3))
        got = triton.backward(problem, problem.dy, s, needs)
        assert [one is not None for one in got] == list(needs)
        bound = check.rules(problem)[check.RESULTS[index + 1]]
        assert deviations("gradient", got[index], every[index].double(), **bound) == []


def test_the_table_of_families():
    def families(chip, dtype=torch.bfloat16, **options):
        options = {"aligned": True, "masked": False} | options
        return {one.family for one in shipped_gemms(dtype, chip, **options)}

    assert families(H100) == {Family.TMA, Family.VENDOR}
    assert families(H100, masked=True) == {Family.TMA}
    assert families(H100, aligned=False) == {Family.POINTER, Family.VENDOR}
    assert families(H100, torch.float32) == {Family.POINTER, Family.VENDOR}
    for chip in (A100, MI300X):
        assert families(chip) == families(chip, aligned=False) == {Family.POINTER, Family.VENDOR}
        assert families(chip, masked=True) == {Family.POINTER}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chip", [A100, H100, MI300X], ids=["A100", "H100", "MI300X"])
def test_every_offered_tile_fits(chip, dtype):
    for aligned in (False, True):
        for masked in (False, True):
            offered = shipped_gemms(dtype, chip, aligned=aligned, masked=masked)
            tiles = [one.tile for one in offered if one != VENDOR]
            assert tiles
            assert all(tile.shared_bytes(dtype.itemsize) <= chip.shared_limit for tile in tiles)
    assert default_gemm(dtype).tile.shared_bytes(dtype.itemsize) <= MI300X.shared_limit


@pytest.mark.parametrize(
    ("n", "k", "aligned"), [(6144, 2048, True), (6141, 2048, False), (6144, 2047, False), (8, 8, True)]
)
def test_alignment_of_rows(n, k, aligned):
    assert is_aligned(torch.bfloat16, n, k) is aligned
