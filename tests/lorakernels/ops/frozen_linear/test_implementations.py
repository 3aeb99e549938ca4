"""The choice among implementations of the gradient through GELU: what is offered, measured and forced."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

pytest.importorskip("triton")
from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.frozen_linear import check, implementations, reference
from lorakernels.ops.frozen_linear.implementations import ATEN, REFERENCE, fused, select
from lorakernels.ops.frozen_linear.reference import Problem

ROWS, N, K = 8192, 2048, 8192
TILES = ["triton:tma-128x256x64w8s3", "triton:tma-128x128x64w8s4"]


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    """An H100, if the test changes nothing about it."""
    traits = SimpleNamespace(name="a GPU", major=9, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(dispatch, "device_properties", lambda device: traits)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    return traits


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The problems that are measured; the last candidate wins."""
    problems: list[str] = []
    monkeypatch.setattr(
        dispatch, "choose", lambda problem, offered, *_, **__: problems.append(problem) or offered[-1]
    )
    return problems


def fake_problem(rows=ROWS, n=N, k=K, dtype=torch.bfloat16, by_columns=False) -> Problem:
    with FakeTensorMode():
        shape = (k, n) if by_columns else (n, k)
        weight = torch.empty(shape, device="cuda", dtype=dtype)
        dy, x = (torch.empty(rows, width, device="cuda", dtype=dtype) for width in (n, k))
        return Problem(dy, weight.T if by_columns else weight, x)


@pytest.fixture(autouse=True)
def aligned_memory(monkeypatch):
    """Fake tensors have no address."""
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 256)


def names(problem: Problem) -> list[str]:
    return [one.name for one in fused(problem)]


def test_offered_where_the_accelerator_can_address_the_operands(chip):
    assert names(fake_problem()) == names(fake_problem(by_columns=True)) == TILES
    assert names(fake_problem(dtype=torch.float16)) == TILES
    for dtype in (torch.float32, torch.float64):
        assert names(fake_problem(dtype=dtype)) == []
    assert names(fake_problem(n=N + 1)) == names(fake_problem(k=K + 4)) == []
    with FakeTensorMode():
        of_odd_strides = torch.empty_strided((N, K), (K + 4, 1), device="cuda", dtype=torch.bfloat16)
    assert names(fake_problem()._replace(weight=of_odd_strides)) == []
    chip.major = 8
    assert names(fake_problem()) == []


def test_small_products_are_not_measured(measured):
    assert select(fake_problem(rows=127)) is ATEN
    assert measured == []
    assert select(fake_problem(rows=128)).name == TILES[-1]
    (problem,) = measured
    assert problem == "frozen_linear backward through GELU on a GPU, bfloat16, M<=128 N=2048 K=8192"


def test_what_the_choice_depends_on(measured):
    for problem in (fake_problem(), fake_problem(rows=ROWS - 9), fake_problem(by_columns=True)):
        select(problem)
    assert measured[0] == measured[1] != measured[2]
    assert measured[2] == measured[0] + ", weight stored by columns"


def test_torchs_alone_is_not_measured(measured):
    assert select(fake_problem(dtype=torch.float32)) is ATEN
    assert measured == []


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("aten", "aten"),
        ("reference", "reference"),
        ("onednn", "aten"),
        ("triton:vendor", "aten"),
        ("triton", TILES[1]),
        (TILES[0], TILES[0]),
    ],
)
def test_forced(backend, expected, measured, monkeypatch):
    monkeypatch.setenv("LORAKERNELS_BACKEND", backend)
    assert select(fake_problem()).name == expected
    assert all(problem.endswith(f", {backend} only") for problem in measured)


def test_a_forced_kernel_that_cannot_run_leaves_it_to_torch(measured, monkeypatch, chip):
    monkeypatch.setenv("LORAKERNELS_BACKEND", "triton")
    chip.major = 8
    assert select(fake_problem()) is ATEN


@pytest.mark.parametrize("sizes", [{"rows": 0}, {"n": 0}, {"k": 0}], ids=str)
def test_a_forced_kernel_has_no_empty_grid(sizes, measured, monkeypatch):
    monkeypatch.setenv("LORAKERNELS_BACKEND", "triton")
    assert select(fake_problem(**sizes)) is ATEN


def halved(*problem: torch.Tensor) -> torch.Tensor:
    return reference.backward(*problem) / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_before_first_use(dtype, device):
    weight = torch.randn(104, 72, device=device).to(dtype) / 10
    trial = implementations._Trial(check.random_problem(50, weight))
    state = torch.get_rng_state()
    for one in (ATEN, REFERENCE, *fused(trial.problem)):
        assert trial.failures(one) == []
    (line,) = trial.failures(Implementation("halved", ATEN.forward, halved))
    assert line.startswith("dx: relative error 0.5")
    assert torch.equal(state, torch.get_rng_state())


def test_the_product_of_torch_is_rounded_twice(device):
    """So that its declared roundings are needed, and the kernel's single one is a claim of its own."""
    weight = torch.randn(104, 72, device=device).bfloat16() / 10
    trial = implementations._Trial(check.random_problem(50, weight))
    once = Implementation("aten", ATEN.forward, ATEN.backward, roundings=1)
    assert trial.failures(once)
