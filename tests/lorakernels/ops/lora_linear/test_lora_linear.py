"""Values and gradients of every backend against float64, PEFT and loralib; wrong ones are caught."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.baselines import lora_linear as baselines
from lorakernels import lora_linear
from lorakernels.ops.lora_linear import check, implementations
from lorakernels.tolerance import deviations, relative_error

BACKENDS = ("reference", "aten", "triton")
# CPU tensors in float32 alone
ONEDNN = pytest.param("onednn", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU"))
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
SHAPES = [(64, 96, 80, 8), (1, 1, 1, 1), (130, 257, 63, 5), (7, 300, 129, 16), (65, 48, 200, 70)]
# One sum may cancel to nothing: a result made of fewer of them is judged in a pool of problems.
FEW = 16
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def make_problem(m, n, k, r, dtype, adapter_dtype, *, device, bias=True, seed=0) -> check.Case:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
    return check.random_case(m, weight, r, adapter_dtype, bias=bias, seed=seed)


def roundings_of(backend: str) -> int:
    """How often that backend rounds a 16-bit y."""
    return implementations.ATEN.roundings if backend == "aten" else 1


def results_of(problem: check.Case, backend: str, **options) -> list[torch.Tensor]:
    """y, dx, dA and dB through the public function."""
    x, weight, bias, lora_a, lora_b = problem.inputs
    leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b)]
    y = lora_linear(leaves[0], weight, bias, *leaves[1:], problem.scale, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.dy)]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, shape, dtypes, device):
    problem = make_problem(*shape, *DTYPES[dtypes], device=device)
    roundings = roundings_of(backend)
    assert check.failures(results_of(problem, backend), problem, roundings=roundings) == []


@settings(max_examples=25, **REPEATABLE)
@given(
    m=st.integers(1, 300), n=st.integers(1, 300), k=st.integers(1, 300), r=st.integers(1, 40),
    dtypes=st.sampled_from(list(DTYPES)), bias=st.booleans(), transposed=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "slice", "expanded dy"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_triton_on_any_problem(device, **drawn):
    assert_right(pool(device=device, **drawn), "triton")


@settings(max_examples=60, **REPEATABLE)
@given(
    m=st.integers(0, 300), n=st.integers(1, 300), k=st.integers(1, 300), r=st.integers(1, 80),
    dtypes=st.sampled_from(list(DTYPES)), bias=st.booleans(), transposed=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "slice", "expanded dy"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_aten_on_any_problem(device, **drawn):
    assert_right(pool(device=device, **drawn), "aten")


@settings(max_examples=60, **REPEATABLE)
@given(
    m=st.integers(1, 300), n=st.integers(1, 300), k=st.integers(1, 300), r=st.integers(1, 80),
    bias=st.booleans(), transposed=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "slice", "expanded dy"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_onednn_on_any_problem(**drawn):
    assert_right(pool(device="cpu", dtypes="fp32", **drawn), "onednn")


def pool_size(m: int, n: int, k: int, r: int, layout: str) -> int:
    """How many problems it takes for S, dS, dA and dB to be made of FEW different sums each."""
    sums = min(m * r, r * k, n * r, r if layout == "expanded dy" else m * r)
    return -(-FEW // sums) if sums else 1


def pool(m, n, k, r, dtypes, bias, transposed, layout, seed, device) -> list[check.Case]:
    """As many problems of a kind as it takes to judge them by."""
    problems = []
    for turn in range(pool_size(m, n, k, r, layout)):
        own_seed = seed + 100 * turn
        problems.append(make_problem(m, n, k, r, *DTYPES[dtypes], bias=bias, seed=own_seed, device=device))
        relaid(problems[-1], transposed, layout)
    return problems


def assert_right(problems: list[check.Case], backend: str) -> None:
    """Every result keeps the rule, over all the problems together."""
    got = zip(*(results_of(problem, backend) for problem in problems), strict=True)
    exact = zip(*(check.exact_results(problem).results for problem in problems), strict=True)
    rules = check.rules(problems[0], roundings_of(backend))
    for name, ours, right in zip(check.RESULTS, got, exact, strict=True):
        ours, right = (torch.cat([one.flatten() for one in results]) for results in (ours, right))
        assert deviations(name, ours, right, **rules[name]) == []


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(88, 1, 1, 1), (150, 2, 1, 2), (3, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_of_few_sums(backend, shape, dtypes, device):
    problems = [
        make_problem(*shape, *DTYPES[dtypes], device=device, seed=seed)
        for seed in range(pool_size(*shape, "rows"))
    ]
    assert_right(problems, backend)


def relaid(problem: check.Case, transposed: bool, layout: str) -> None:
    """The same values in other storage orders."""
    if transposed:
        problem.weight = problem.weight.T.contiguous().T
    if layout == "columns":
        problem.x = problem.x.T.contiguous().T
    elif layout == "slice":
        problem.x = torch.cat([problem.x, problem.x], 1)[:, : problem.x.shape[1]]
    elif layout == "expanded dy":
        problem.dy = problem.dy[:1, :1].expand_as(problem.dy)


@pytest.mark.parametrize("backend", [*BACKENDS, ONEDNN])
@pytest.mark.parametrize("leading", [(0,), (0, 5), (2, 0, 3)])
def test_empty_batch(backend, leading, device):
    x = torch.randn(*leading, 12, device=device, requires_grad=True)
    weight, bias = torch.randn(20, 12, device=device), torch.randn(20, device=device)
    lora_a = torch.randn(4, 12, device=device, requires_grad=True)
    lora_b = torch.randn(20, 4, device=device, requires_grad=True)
    y = lora_linear(x, weight, bias, lora_a, lora_b, 2.0, backend=backend)
    y.sum().backward()
    assert y.shape == (*leading, 20)
    assert x.grad.shape == x.shape
    assert not lora_a.grad.any()
    assert not lora_b.grad.any()


@pytest.mark.parametrize("backend", [*BACKENDS, ONEDNN])
def test_leading_dimensions_and_strides(backend, device):
    problem = make_problem(24, 40, 30, 4, torch.float32, torch.float32, device=device)
    x = problem.x.view(2, 3, 4, 30).transpose(0, 2)
    y = lora_linear(x, *problem.inputs[1:], problem.scale, backend=backend)
    flat = lora_linear(problem.x, *problem.inputs[1:], problem.scale, backend=backend)
    torch.testing.assert_close(y, flat.view(2, 3, 4, 40).transpose(0, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    problem = make_problem(300, 70, 90, 8, torch.bfloat16, torch.float32, device=device)
    first, second = results_of(problem, backend), results_of(problem, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", [*BACKENDS, ONEDNN])
def test_caller_tensors_stay_as_they_are(backend, device):
    problem = make_problem(20, 30, 40, 8, torch.float32, torch.float32, device=device)
    tensors = [*problem.inputs, problem.dy]
    before = [t.clone() for t in tensors]
    results_of(problem, backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("library", [baselines.peft_linear, baselines.loralib_linear])
@pytest.mark.parametrize("backend", ["aten", "triton", ONEDNN])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_other_libraries(library, backend, bias, device):
    problem = make_problem(33, 80, 48, 6, torch.float32, torch.float32, bias=bias, device=device)
    theirs, adapters = library(problem)
    x = problem.x.clone().requires_grad_()
    y = theirs(x)
    expected = [y.detach(), *torch.autograd.grad(y, [x, *adapters], problem.dy)]
    for name, got, their in zip(check.RESULTS, results_of(problem, backend), expected, strict=True):
        # by norm: elements that cancel to nothing differ by chance, one problem in fifteen at 1e-4 each
        assert relative_error(got, their) < 1e-6, name


def test_the_check_catches_wrong_results(device):
    problem = make_problem(64, 96, 80, 8, torch.bfloat16, torch.float32, device=device)
    right = results_of(problem, "aten")
    assert check.failures(right, problem, roundings=2) == []
    for index, name in enumerate(check.RESULTS):
        for wrong in (right[index] * 1.01, torch.full_like(right[index], float("nan"))):
            damaged = [*right[:index], wrong, *right[index + 1 :]]
            assert [line.split(":")[0] for line in check.failures(damaged, problem, roundings=2)] == [name]
