"""The check of the LoRA linear: what a GPU was measured to be off passes, what is wrong does not."""

import math

import pytest
import torch

from lorakernels import tolerance
from lorakernels.ops.lora_linear import check
from tests.lorakernels.largest_tensor import LargestTensor

M, N, K, R = 8192, 96, 80, 8


def off_by(exact: torch.Tensor, error: float, dtype: torch.dtype) -> torch.Tensor:
    """exact with independent errors of that relative size, then in dtype."""
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (exact + noise * (error * exact.norm() / noise.norm())).to(dtype)


@pytest.fixture(scope="module")
def problem() -> check.Case:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).div(K**0.5)
    return check.random_case(M, weight.bfloat16(), R, torch.float32)


@pytest.fixture(scope="module")
def exact(problem) -> check.Exact:
    return check.exact_results(problem)


# on an H200 at M=8192 and N=6144 and 12288: the kernels, then the vendor's products
@pytest.mark.parametrize(
    ("y", "da", "db", "roundings"),
    [(0.0, 1.9e-6, 2.2e-6, 1), (0.0, 4.1e-6, 2.2e-6, 1), (0.0017, 1e-5, 1e-5, 2)],
)
def test_errors_that_were_measured_on_a_gpu_pass(y, da, db, roundings, problem, exact):
    results = [
        off_by(right, error, dtype)
        for right, error, dtype in zip(
            exact.results, (y, y, da, db), [torch.bfloat16] * 2 + [torch.float32] * 2, strict=True
        )
    ]
    if y:
        assert tolerance.relative_error(results[0], exact.results[0]) == pytest.approx(0.0024, rel=0.02)
    assert check.failures(results, problem, roundings=roundings, exact=exact) == []


def test_one_direction_is_exact_without_the_other(problem, exact, monkeypatch):
    monkeypatch.setattr(check, "EXACT_ROWS", 3000)
    multiplier = (torch.rand(M, K, generator=torch.Generator().manual_seed(2)) < 0.5) / 0.5
    for kept, both in ((None, exact), (multiplier, check.exact_results(problem, multiplier))):
        found = {}
        for direction, names in {"forward": {"y", "S"}, "backward": {"dx", "dA", "dB", "S", "dS"}}.items():
            one = check.exact_results(problem, kept, directions=(direction,)).named
            assert set(one) == names
            found |= one
        for name, right in found.items():
            torch.testing.assert_close(right, both.named[name], rtol=1e-12, atol=1e-12)


def test_thin_factors_in_16_bits_do_not(problem, exact):
    """S and dS rounded, everything else exact: in y a structure, in dA and dB 1.7e-3."""
    right = dict(zip(check.RESULTS, exact.results, strict=True))
    x, lora_a, lora_b, dy = (t.double() for t in (problem.x, problem.lora_a, problem.lora_b, problem.dy))
    s, ds = (factor.bfloat16().double() for factor in (exact.s, exact.ds))
    wrong = {
        "y": right["y"] + (s - exact.s) @ lora_b.T,
        "dx": right["dx"] + (ds - exact.ds) @ lora_a,
        "dA": ds.T @ x,
        "dB": dy.T @ s,
    }
    for name in check.RESULTS:
        results = [
            {**right, name: wrong[name]}[one].to(rule["dtype"]) for one, rule in check.rules(problem).items()
        ]
        for roundings in (1, 2):
            lines = check.failures(results, problem, roundings=roundings, exact=exact)
            assert {line.split(":")[0].split()[0] for line in lines} == {name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 512), (512, 1), (2, 512), (512, 2)])
def test_right_results_of_narrow_layers_pass(n, k, dtype):
    """With one output or one input, rows of dx or y are multiples of each other, and so are their errors."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).div(k**0.5).to(dtype)
    problem = check.random_case(M, weight, R, torch.float32)
    exact = check.exact_results(problem)
    dtypes = (rule["dtype"] for rule in check.rules(problem).values())
    results = [right.to(one) for right, one in zip(exact.results, dtypes, strict=True)]
    assert check.failures(results, problem, exact=exact) == []


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_float16_holds_adapters_of_any_scale(scale):
    weight = torch.full((512, 1024), 1 / 32, dtype=torch.float16)
    problem = check.random_case(2000, weight, 1, torch.float16, scale=scale)
    assert problem.lora_b.isfinite().all()
    assert all(right.half().isfinite().all() for right in check.exact_results(problem).results)


@pytest.mark.parametrize("scale", [4.0, -0.1])
@pytest.mark.parametrize("size", [0.02, 3.0])
def test_no_part_of_a_random_problem_is_negligible(size, scale):
    weight = size * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    problem = check.random_case(400, weight, 8, torch.float32, scale=scale)
    y, dx = check.exact_results(problem).results[:2]
    frozen_y, frozen_dx = problem.x @ weight.T, problem.dy @ weight
    assert problem.bias.norm() * math.sqrt(400) == pytest.approx(float(frozen_y.norm()), rel=0.2)
    update_y = y - frozen_y - problem.bias
    assert float(update_y.norm() / frozen_y.norm()) == pytest.approx(check.UPDATE_SHARE, rel=0.2)
    assert float((dx - frozen_dx).norm() / frozen_dx.norm()) == pytest.approx(check.UPDATE_SHARE, rel=0.2)


def test_a_frozen_weight_of_zeros_leaves_an_update():
    problem = check.random_case(20, torch.zeros(30, 40), 4, torch.float32)
    assert problem.lora_b.norm() > 1


def test_float16_holds_the_gradients_of_a_long_batch():
    weight = torch.ones(4096, 64, dtype=torch.float16)
    problem = check.random_case(2**14, weight, 8, torch.float16, scale=4.0)
    assert all(right.abs().max() < 2**14 for right in check.exact_results(problem).results)


def test_relative_error_widens_some_rows_at_a_time(monkeypatch):
    exact = torch.randn(1000, 30, dtype=torch.float64)
    got = exact.bfloat16()
    whole = float((got.double() - exact).norm() / exact.norm())
    monkeypatch.setattr(tolerance, "BLOCK_ELEMENTS", 3000)
    with LargestTensor() as seen:
        assert tolerance.relative_error(got, exact) == pytest.approx(whole, rel=1e-12)
    assert seen.elements <= 3000


@pytest.mark.parametrize(
    ("got", "exact", "error"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), math.inf),
        (torch.tensor([1.0, math.nan]), torch.ones(2), math.inf),
        (torch.tensor([1.0, math.inf]), torch.ones(2), math.inf),
        (torch.ones(2), torch.zeros(2), math.sqrt(2)),
        (torch.ones(0, 3), torch.ones(0, 3), 0.0),
        (torch.ones(3, 0), torch.ones(3, 0), 0.0),
        (torch.tensor(1.5), torch.tensor(1.0), 0.5),
    ],
)
def test_relative_error_of_odd_results(got, exact, error):
    assert tolerance.relative_error(got, exact) == pytest.approx(error)
