"""The sum, its layer norm, the statistics and the gradient of every implementation against float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from lorakernels import add_layer_norm, dispatch, layer_norm_shrink
from lorakernels.ops.add_layer_norm import check, choice, implementations
from lorakernels.tolerance import deviations, relative_error

WAYS = {one.name: one for one in (implementations.REFERENCE, implementations.ATEN, implementations.TRITON)}
BACKENDS = list(WAYS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M and K: one row, one more than a power of two, ragged, and as narrow as the gradient's rule holds for
SHAPES = [(64, 80), (1, 300), (33, 700), (17, 1025), (45, 33)]
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def found(name: str, problem: check.Problem) -> list[str]:
    return check.failures(WAYS[name].forward(problem), problem)


def found_backward(name: str, problem: check.BackwardProblem) -> list[str]:
    way = WAYS[name]
    return check.backward_failures(way.backward(problem), problem, way.roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_against_float64(name, shape, dtype, device):
    assert found(name, check.random_problem(*shape, dtype, device)) == []
    for adds in (True, False):
        assert found_backward(name, check.random_backward_problem(*shape, dtype, device, adds=adds)) == []


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "columns":
        return tensor.T.contiguous().T
    return torch.cat([tensor, torch.full_like(tensor, 9)], 1)[:, : tensor.shape[1]]


@settings(max_examples=25, **REPEATABLE)
@given(
    m=st.integers(1, 20), k=st.integers(32, 600), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["columns", "slice"]), seed=st.integers(0, 99),
    names=st.sets(st.sampled_from(["x", "residual", "dh", "dt"])),
)  # fmt: skip
def test_the_kernels_on_any_problem(m, k, dtype, layout, names, seed, device):
    problem = check.random_problem(m, k, dtype, device, seed=seed)
    backward = check.random_backward_problem(m, k, dtype, device, seed=seed)
    for name, one in itertools.product(names, (problem, backward)):
        if hasattr(one, name):
            setattr(one, name, laid_out(getattr(one, name), layout))
    assert found("triton", problem) == []
    assert found_backward("triton", backward) == []


WIDEST = {torch.float32: 8192, torch.bfloat16: 16_384}


@pytest.mark.parametrize(("dtype", "k"), WIDEST.items(), ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_the_widest_rows(name, dtype, k, device):
    assert found(name, check.random_problem(3, k, dtype, device)) == []
    assert found_backward(name, check.random_backward_problem(3, k, dtype, device)) == []


@pytest.mark.parametrize(("dtype", "k"), WIDEST.items(), ids=str)
def test_wider_rows_are_torchs(dtype, k, device):
    problem = check.random_problem(2, k, dtype, device)
    assert implementations.select(problem, "triton") is implementations.TRITON
    problem = check.random_problem(2, k + 1, dtype, device)
    assert implementations.select(problem, "triton") is implementations.ATEN
    assert found("aten", problem) == []


@pytest.mark.parametrize("name", WAYS)
def test_a_mean_of_a_thousand_deviations_costs_its_digits_and_no_more(name, device):
    """The variance from squares about zero would be off by 6%: 2^20 against a float32 of 24 bits."""
    problem = check.random_problem(20, 700, torch.float32, device)
    problem.x = problem.x + 1000
    t, h, mean, rstd = WAYS[name].forward(problem)
    wide = t.double()
    assert relative_error(mean, wide.mean(1, keepdim=True)) < 1e-6
    exact_rstd = (wide.var(1, correction=0, keepdim=True) + problem.eps).rsqrt()
    assert relative_error(rstd, exact_rstd) < 1e-5
    exact = layer_norm(wide, [700], problem.weight.double(), problem.bias.double(), problem.eps)
    # t - mean has lost 10 of 24 bits
    assert relative_error(h, exact) < 1000 * 2**-23


@pytest.mark.parametrize("name", WAYS)
def test_rows_do_not_see_each_other(name, device):
    problem = check.random_problem(40, 90, torch.float32, device)
    problem.x[7] = float("nan")
    problem.residual[21] *= 1e4
    results = WAYS[name].forward(problem)
    others = [row for row in range(40) if row not in (7, 21)]
    problem = replace(problem, x=problem.x[others], residual=problem.residual[others])
    assert check.failures(tuple(one[others] for one in results), problem) == []


def exact_gradients(problem: check.Problem, dt, dh) -> torch.Tensor:
    """The gradient of x, which is that of the residual, by float64 autograd on the rounded sum."""
    t = (problem.x + problem.residual).double().requires_grad_()
    k = t.shape[1]
    h = layer_norm(t, [k], problem.weight.double(), problem.bias.double(), problem.eps)
    given = [(one, gradient.double()) for one, gradient in ((t, dt), (h, dh)) if gradient is not None]
    results, gradients = zip(*given, strict=True)
    (found,) = torch.autograd.grad(results, t, gradients)
    return found


@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@pytest.mark.parametrize("needs", ["both", "x", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_is_used_for_what_asks(backend, dtype, needs, used, device):
    problem = check.random_problem(30, 90, dtype, device)
    leaves = [problem.x.clone(), problem.residual.clone()]
    asking = [one for name, one in zip(("x", "residual"), leaves, strict=True) if needs in ("both", name)]
    for one in asking:
        one.requires_grad_()
    results = add_layer_norm(*leaves, problem.weight, problem.bias, problem.eps, backend=backend)
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(30, 90, generator=generator).to(device, dtype) if used in ("both", name) else None
        for name in ("sum", "norm")
    ]
    given = [(one, dy) for one, dy in zip(results, gradients, strict=True) if dy is not None]
    torch.autograd.backward(*zip(*given, strict=True))
    exact = exact_gradients(problem, *gradients)
    roundings = WAYS[backend].roundings
    for one in asking:
        lines = deviations("dx", one.grad, exact, dtype, operands=dtype, terms=90, roundings=roundings)
        assert lines == []
    assert all(one.grad is None for one in leaves if not one.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_rounds_the_sum_of_both_terms_once(dtype, device):
    """Two roundings are above the bound for one."""
    problem = check.random_backward_problem(64, 300, dtype, device)
    assert check.backward_failures(WAYS["triton"].backward(problem), problem) == []
    twice = WAYS["triton"].backward(replace(problem, dt=None)) + problem.dt
    assert check.backward_failures(twice, problem) != []


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_norm_is_that_of_the_rounded_sum(backend, device):
    """A residual that is lost when the sum is rounded has no part in the layer norm."""
    x = torch.randn(8, 64, device=device).to(torch.bfloat16) + 256
    lost = torch.full_like(x, 0.25)
    weight, bias = torch.ones_like(x[0]), torch.zeros_like(x[0])
    t, h = add_layer_norm(x, lost, weight, bias, 1e-5, backend=backend)
    assert torch.equal(t, x)
    assert torch.equal(h, add_layer_norm(x, torch.zeros_like(x), weight, bias, 1e-5, backend=backend)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["both", "x", "norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_where_a_residual_begins_at_the_shrinks_input(backend, used, dtype, device):
    """layer_norm_shrink hands on x itself, and adds what comes back through it."""
    problem = check.random_problem(30, 90, dtype, device)
    leaf = (problem.x + problem.residual).requires_grad_()
    lora_a = torch.randn(4, 90, generator=torch.Generator().manual_seed(2)).to(device)
    arguments = (leaf, problem.weight, problem.bias, problem.eps, lora_a, 2.0)
    h, s, _, x = layer_norm_shrink(*arguments, backend=backend, return_x=True)
    plain = layer_norm_shrink(*arguments, backend=backend)
    assert all(map(torch.equal, (h, s, x), (*plain[:2], leaf)))
    assert x.data_ptr() == leaf.data_ptr()
    assert not s.requires_grad
    generator = torch.Generator().manual_seed(1)
    dx, dh = (
        torch.randn(30, 90, generator=generator).to(device, dtype) if used in ("both", name) else None
        for name in ("x", "norm")
    )
    given = [(one, dy) for one, dy in ((x, dx), (h, dh)) if dy is not None]
    torch.autograd.backward(*zip(*given, strict=True))
    exact, roundings = exact_gradients(problem, dx, dh), WAYS[backend].roundings
    lines = deviations("dx", leaf.grad, exact, dtype, operands=dtype, terms=90, roundings=roundings)
    assert lines == []


@pytest.mark.parametrize("leading", [(0,), (0, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_batch(backend, leading, device):
    x = torch.randn(*leading, 12, device=device, requires_grad=True)
    weight, bias = torch.ones(12, device=device), torch.zeros(12, device=device)
    t, h = add_layer_norm(x, x.detach(), weight, bias, 1e-5, backend=backend)
    (t + h).sum().backward()
    assert (t.shape, h.shape, x.grad.shape) == (x.shape,) * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_strides(backend, device):
    problem = check.random_problem(24, 30, torch.float32, device)
    parameters = problem.weight, problem.bias, problem.eps
    x, residual = (one.view(2, 3, 4, 30).transpose(0, 2) for one in (problem.x, problem.residual))
    results = add_layer_norm(x, residual, *parameters, backend=backend)
    flat = add_layer_norm(x.reshape(24, 30), residual.reshape(24, 30), *parameters, backend=backend)
    for one, right in zip(results, flat, strict=True):
        assert torch.equal(one, right.view(4, 3, 2, 30))


class OnGpu:
    """What a choice asks of x."""

    is_cuda, is_cpu, device = True, False, torch.device("meta")

    def __init__(self, dtype: torch.dtype, rows: int = 2**15, width: int = 64) -> None:
        self.dtype, self.shape = dtype, (rows, width)

    def numel(self) -> int:
        return math.prod(self.shape)


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, list[str]]]:
    """The problem and the candidates of every choice on a GPU; the last candidate wins."""
    seen = []

    def choose(problem, candidates, make_trial, *, reference):
        seen.append((problem, [one.name for one in candidates]))
        assert (reference is None) == problem.endswith("only")
        return candidates[-1]

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    return seen


def on_gpu(direction: str, x: OnGpu) -> check.Problem | check.BackwardProblem:
    if direction == "forward":
        return replace(check.random_problem(2, 64, torch.float32, "cpu"), x=x)
    made = check.random_backward_problem(2, 64, torch.float32, "cpu", adds=direction == "backward")
    return replace(made, x=x)


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "expected"),
    [
        ("auto", torch.bfloat16, 64, ["aten", "triton"]),
        ("auto", torch.bfloat16, 2**14 + 1, ["aten"]),
        ("auto", torch.float64, 64, ["aten"]),
        ("triton", torch.bfloat16, 64, ["triton"]),
        ("aten", torch.bfloat16, 64, ["aten"]),
        ("reference", torch.bfloat16, 64, ["reference"]),
    ],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_what_a_gpu_chooses_from(backend, dtype, width, expected, by_environment, monkeypatch, asked):
    if by_environment and backend != "auto":
        monkeypatch.setenv("LORAKERNELS_BACKEND", backend)
    for direction in ("forward", "backward", "backward, nothing added"):
        problem = on_gpu(direction, OnGpu(dtype, width=width))
        chosen = implementations.select(problem, "auto" if by_environment else backend)
        described, candidates = asked.pop()
        assert described.startswith(f"add_layer_norm {direction} on a GPU, ")
        assert candidates == expected
        assert chosen.name == expected[-1]


@pytest.mark.parametrize(("rows", "width", "measured"), [(2**15 - 1, 64, 0), (2**15, 64, 1), (2**20, 31, 0)])
def test_what_a_gpu_reads_within_a_launch_and_what_cancels_are_not_measured(rows, width, measured, asked):
    chosen = implementations.select(on_gpu("backward", OnGpu(torch.bfloat16, rows, width)), "auto")
    assert len(asked) == measured
    assert measured or chosen is implementations.ATEN


def test_a_cpu_does_not_ask(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_, **__: pytest.fail("measured"))
    problem = check.random_problem(3000, 1000, torch.float32, "cpu")
    assert implementations.select(problem, "auto") is implementations.ATEN


@pytest.mark.parametrize(("name", "rows"), list(itertools.product(WAYS, (1, 40))))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_check_before_first_use(name, rows, dtype, device):
    forward = check.random_problem(rows, 60, dtype, device)
    backward = check.random_backward_problem(rows, 60, dtype, device)
    for problem in (forward, backward, replace(backward, dt=None)):
        trial = implementations._Trial(problem)
        trial.compile(WAYS[name])
        trial.run(WAYS[name])
        assert trial.failures(WAYS[name]) == []


def test_the_check_finds_a_broken_implementation(device):
    forward = check.random_problem(40, 60, torch.bfloat16, device)
    backward = check.random_backward_problem(40, 60, torch.bfloat16, device)

    def wrong_norm(problem):
        t, h, mean, rstd = implementations.ATEN.forward(problem)
        return t, h * 1.02, mean, rstd

    def without_dt(problem):
        return implementations.ATEN.backward(replace(problem, dt=None))

    broken = dispatch.Implementation("broken", wrong_norm, without_dt, roundings=2)
    for problem in (forward, backward):
        assert implementations._Trial(problem).failures(broken) != []
