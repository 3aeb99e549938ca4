"""h, S and the statistics of every implementation against float64, and the gradients of the composition."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from lorakernels import dispatch, layer_norm_shrink, lora_linear
from lorakernels.ops.add_layer_norm import choice
from lorakernels.ops.add_layer_norm.reference import layer_norm as layer_norm_and_statistics
from lorakernels.ops.layer_norm_shrink import check, implementations
from lorakernels.ops.lora_linear import check as layer_check
from lorakernels.ops.lora_linear import implementations as layer_implementations
from lorakernels.ops.lora_linear.reference import keep_mask
from lorakernels.tolerance import deviations, relative_error

WAYS = {one.name: one for one in (implementations.REFERENCE, implementations.ATEN, implementations.TRITON)}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
# M, K and r: one of each, ragged against every block, ranks up to the largest
SHAPES = [(64, 80, 8), (20, 1, 16), (1, 300, 16), (33, 700, 70), (17, 1100, 128), (45, 129, 5)]
SEED = 12345678901234567
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def found(name: str, problem: check.Problem) -> list[str]:
    """What is wrong with an implementation's results, with or without dropout."""
    multiplier = None
    if problem.dropout_p:
        kept = keep_mask(problem.seed, *problem.x.shape, problem.dropout_p)
        multiplier = kept / (1 - problem.dropout_p)
    return check.failures(WAYS[name].forward(problem), problem, multiplier)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_against_float64(name, shape, dtypes, dropout_p, device):
    problem = check.random_problem(*shape, *DTYPES[dtypes], device)
    if dropout_p:
        problem = replace(problem, dropout_p=dropout_p, seed=torch.tensor([SEED], device=device))
    assert found(name, problem) == []


@settings(max_examples=25, **REPEATABLE)
@given(
    m=st.integers(16, 60), k=st.integers(1, 400), r=st.integers(1, 128),
    dtypes=st.sampled_from(list(DTYPES)), layout=st.sampled_from(["rows", "columns", "slice"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_kernel_on_any_problem(m, k, r, dtypes, layout, seed, device):
    problem = check.random_problem(m, k, r, *DTYPES[dtypes], device, seed=seed)
    for name in ("x", "lora_a"):
        tensor = getattr(problem, name)
        if layout == "columns":
            tensor = tensor.T.contiguous().T
        elif layout == "slice":
            tensor = torch.cat([tensor, torch.full_like(tensor, 9)], 1)[:, :k]
        setattr(problem, name, tensor)
    assert found("triton", problem) == []


@pytest.mark.parametrize("name", WAYS)
def test_the_widest_rows(name, device):
    problem = check.random_problem(3, 16_384, 8, torch.bfloat16, torch.float32, device)
    assert found(name, problem) == []


@pytest.mark.parametrize("name", WAYS)
def test_a_mean_of_a_thousand_deviations_costs_its_digits_and_no_more(name, device):
    """The variance from squares about zero would be off by 6%: 2^20 against a float32 of 24 bits."""
    problem = check.random_problem(20, 700, 8, torch.float32, torch.float32, device)
    problem.x = problem.x + 1000
    h, _, mean, rstd = WAYS[name].forward(problem)
    given = (one.double() for one in (problem.x, problem.norm_weight, problem.norm_bias))
    exact_h, exact_mean, exact_rstd = layer_norm_and_statistics(*given, problem.eps)
    assert relative_error(mean, exact_mean) < 1e-6
    assert relative_error(rstd, exact_rstd) < 1e-5
    # x - mean has lost 10 of 24 bits
    assert relative_error(h, exact_h) < 1000 * 2**-23


@pytest.mark.parametrize("name", WAYS)
def test_rows_do_not_see_each_other(name, device):
    problem = check.random_problem(40, 90, 8, torch.float32, torch.float32, device)
    problem.x[7] = float("nan")
    problem.x[21] *= 1e4
    h, s, mean, rstd = WAYS[name].forward(problem)
    others = [row for row in range(40) if row not in (7, 21)]
    problem.x = problem.x[others]
    assert check.failures(tuple(one[others] for one in (h, s, mean, rstd)), problem) == []


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16-fp32", "fp16"])
def test_gradients_of_the_composition(backend, dtypes, dropout_p, device):
    """dx of x, dA and dB against float64 autograd through layer norm and textbook LoRA of the same mask."""
    m, n, k, r = 50, 70, 90, 6
    dtype, adapter_dtype = DTYPES[dtypes]
    norm = check.random_problem(m, k, r, dtype, adapter_dtype, device)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).div(k**0.5).to(device, dtype)
    layer = layer_check.random_case(m, weight, r, adapter_dtype)
    leaves = [one.detach().requires_grad_() for one in (norm.x, layer.lora_a, layer.lora_b)]
    x, lora_a, lora_b = leaves
    torch.manual_seed(3)
    h, s, seed = layer_norm_shrink(
        x, norm.norm_weight, norm.norm_bias, norm.eps, lora_a, layer.scale, dropout_p=dropout_p,
        backend=backend,
    )  # fmt: skip
    assert (h.requires_grad, s.requires_grad, seed.shape) == (True, False, (1 if dropout_p else 0,))
    y = lora_linear(
        h, weight, layer.bias, lora_a, lora_b, layer.scale, dropout_p=dropout_p, backend=backend,
        shrunk=(s, seed),
    )  # fmt: skip
    dh, dx, da, db = torch.autograd.grad(y, [h, *leaves], layer.dy)
    multiplier = keep_mask(seed, m, k, dropout_p) / (1 - dropout_p) if dropout_p else None
    # as lora_linear alone on the same h
    problem = replace(layer, x=h.detach())
    rounded = layer_implementations.ATEN.roundings if backend == "aten" else 1
    exact = layer_check.exact_results(problem, multiplier)
    assert (
        layer_check.failures([y.detach(), dh, da, db], problem, multiplier, roundings=rounded, exact=exact)
        == []
    )
    # and back through the layer norm
    wide = norm.x.double().requires_grad_()
    normed = layer_norm(wide, [k], norm.norm_weight.double(), norm.norm_bias.double(), norm.eps)
    (exact_dx,) = torch.autograd.grad(normed, wide, exact.results[1])
    # rounded: the gradient of h, once or twice, and dx
    assert deviations("dx", dx, exact_dx, dtype, operands=dtype, terms=m + n + k, roundings=rounded + 1) == []


@pytest.mark.parametrize("backend", ["reference", "aten", "aten-wide", "onednn", "triton"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_every_implementation_takes_s_as_it_is(backend, dropout_p, device):
    """S that belongs to no x at all changes y and dB alone, by what it should."""
    if backend == "onednn" and device != "cpu":
        pytest.skip("oneDNN multiplies on a CPU")
    dtype = torch.float32 if backend == "onednn" else torch.bfloat16
    weight = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)).div(7).to(device, dtype)
    case = layer_check.random_case(48, weight, 5, torch.float32)
    seed = torch.tensor([SEED], device=device)
    case = replace(case, dropout_p=dropout_p, seed=seed if dropout_p else case.seed)
    run = layer_implementations.select(case, backend, "forward")
    other = torch.randn(48, 5, generator=torch.Generator().manual_seed(1)).to(device)
    y, s = run.forward(replace(case, s=other))
    assert torch.equal(s, other)
    exact_y = (
        case.x.double() @ weight.double().T + case.bias.double() + other.double() @ case.lora_b.double().T
    )
    assert deviations("y", y, exact_y, dtype, operands=dtype, terms=45, roundings=run.roundings) == []


def test_lora_linear_uses_the_seed_it_is_given(device):
    layer = layer_check.random_case(30, torch.randn(50, 40, device=device), 4, torch.float32)
    norm = check.random_problem(30, 40, 4, torch.float32, torch.float32, device)
    drawn = []
    for backend in ("reference", "aten", "triton"):
        torch.manual_seed(0)
        h, s, seed = layer_norm_shrink(
            norm.x, norm.norm_weight, norm.norm_bias, norm.eps, layer.lora_a, layer.scale, dropout_p=0.5,
            backend=backend,
        )  # fmt: skip
        state = torch.get_rng_state()
        others = layer.inputs[1:]
        with_s = lora_linear(h, *others, layer.scale, dropout_p=0.5, backend=backend, shrunk=(s, seed))
        # which draws nothing itself, and has the mask of lora_linear alone under the same manual_seed
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(0)
        alone = lora_linear(h, *others, layer.scale, dropout_p=0.5, backend=backend)
        assert relative_error(with_s, alone) < 1e-6
        drawn.append(seed)
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_a_given_seed_is_used_and_returned(backend, device):
    problem = check.random_problem(30, 40, 4, torch.float32, torch.float32, device)
    arguments = (problem.x, problem.norm_weight, problem.norm_bias, problem.eps, problem.lora_a, 2.0)
    torch.manual_seed(0)
    h, s, drawn = layer_norm_shrink(*arguments, dropout_p=0.5, backend=backend)
    state, given = torch.get_rng_state(), drawn.clone()
    results = layer_norm_shrink(*arguments, dropout_p=0.5, backend=backend, seed=given)
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, results, (h, s, drawn)))
    assert results[2] is given
    _, other, _ = layer_norm_shrink(*arguments, dropout_p=0.5, backend=backend, seed=given + 1)
    assert not torch.equal(other, s)
    assert layer_norm_shrink(*arguments, backend=backend, seed=given)[2].shape == (0,)
    with pytest.raises(ValueError, match=r"seed: expected shape \[1\]"):
        layer_norm_shrink(*arguments, dropout_p=0.5, backend=backend, seed=given.expand(2))


@pytest.mark.parametrize("leading", [(0,), (0, 5), (2, 0, 3)])
@pytest.mark.parametrize("backend", ["auto", "reference", "aten", "triton"])
def test_empty_batch(backend, leading, device):
    x = torch.randn(*leading, 12, device=device, requires_grad=True)
    parameters = torch.ones(12, device=device), torch.zeros(12, device=device)
    lora_a = torch.randn(4, 12, device=device)
    h, s, _ = layer_norm_shrink(x, *parameters, 1e-5, lora_a, 2.0, backend=backend)
    h.sum().backward()
    assert (h.shape, s.shape, x.grad.shape) == (x.shape, (0, 4), x.shape)


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_leading_dimensions_and_strides(backend, device):
    problem = check.random_problem(24, 30, 4, torch.float32, torch.float32, device)
    arguments = problem.norm_weight, problem.norm_bias, problem.eps, problem.lora_a, problem.scale
    x = problem.x.view(2, 3, 4, 30).transpose(0, 2)
    h, s, _ = layer_norm_shrink(x, *arguments, backend=backend)
    flat_h, flat_s, _ = layer_norm_shrink(x.reshape(24, 30), *arguments, backend=backend)
    assert torch.equal(h, flat_h.view(4, 3, 2, 30))
    assert torch.equal(s, flat_s)


def test_ranks_above_the_kernels_largest_are_torchs(device):
    problem = check.random_problem(20, 40, 129, torch.bfloat16, torch.float32, device)
    assert implementations.select(problem, "triton").name == "aten"
    problem = check.random_problem(20, 40, 128, torch.bfloat16, torch.float32, device)
    assert implementations.select(problem, "triton").name == "triton"


class OnGpu:
    """What a choice asks of x."""

    is_cuda, is_cpu, device = True, False, torch.device("meta")

    def __init__(self, dtype: torch.dtype, rows: int = 2**15) -> None:
        self.dtype, self.shape = dtype, (rows, 64)

    def numel(self) -> int:
        return math.prod(self.shape)


@pytest.mark.parametrize(
    ("backend", "dtype", "rank", "expected"),
    [
        ("auto", torch.bfloat16, 8, ["aten", "triton"]),
        ("auto", torch.bfloat16, 129, ["aten"]),
        ("auto", torch.float64, 8, ["aten"]),
        ("triton", torch.bfloat16, 8, ["triton"]),
        ("aten", torch.bfloat16, 8, ["aten"]),
        ("reference", torch.bfloat16, 8, ["reference"]),
    ],
)
@pytest.mark.parametrize("by_environment", [False, True])
def test_what_a_gpu_chooses_from(backend, dtype, rank, expected, by_environment, monkeypatch):
    asked = []

    def choose(problem, candidates, make_trial, *, reference):
        asked.append([one.name for one in candidates])
        assert (reference is None) == (backend != "auto")
        return candidates[-1]

    monkeypatch.setattr(dispatch, "choose", choose)
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    if by_environment and backend != "auto":
        monkeypatch.setenv("LORAKERNELS_BACKEND", backend)
    problem = check.random_problem(2, 64, rank, torch.float32, torch.float32, "cpu")
    problem.x = OnGpu(dtype)
    chosen = implementations.select(problem, "auto" if by_environment else backend)
    assert asked == [expected]
    assert chosen.name == expected[-1]


def test_what_a_gpu_reads_within_a_launch_is_not_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "choose", lambda problem, candidates, *_, **__: asked.append(candidates))
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "a GPU")
    problem = check.random_problem(2, 64, 8, torch.float32, torch.float32, "cpu")
    problem.x = OnGpu(torch.bfloat16, 2**15 - 1)
    assert implementations.select(problem, "auto") is implementations.ATEN
    assert not asked
    problem.x = OnGpu(torch.bfloat16, 2**15)
    implementations.select(problem, "auto")
    assert len(asked) == 1


def test_a_cpu_does_not_ask(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_, **__: pytest.fail("measured"))
    problem = check.random_problem(3000, 256, 8, torch.float32, torch.float32, "cpu")
    assert implementations.select(problem, "auto") is implementations.ATEN


@pytest.mark.parametrize(("name", "rows"), list(itertools.product(WAYS, (1, 40))))
def test_the_check_before_first_use(name, rows, device):
    problem = check.random_problem(rows, 60, 2, torch.bfloat16, torch.float32, device)
    dropped = replace(problem, dropout_p=0.5, seed=torch.tensor([SEED], device=device))
    trial = implementations._Trial(dropped)
    assert (trial.timed.dropout_p, trial.checked.x.shape[0]) == (0.5, max(rows, 8))
    trial.run(WAYS[name])
    assert trial.failures(WAYS[name]) == []
