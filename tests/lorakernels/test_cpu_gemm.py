"""frozen_linear against float64, by each library and in both precisions; the measurements that choose."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from lorakernels import cpu_gemm, dispatch, examination, frozen_linear
from lorakernels.ops import frozen_linear as module
from lorakernels.tolerance import deviations
from tests.lorakernels.largest_tensor import LargestTensor


def results_of(function, x, weight, bias, incoming, **options):
    x = x.detach().requires_grad_()
    y = function(x, weight, bias, **options)
    return [y.detach(), *torch.autograd.grad(y, x, incoming)]


def plain_linear(x, weight, bias, gelu):
    x = torch.nn.functional.gelu(x, approximate="tanh") if gelu else x
    return torch.nn.functional.linear(x, weight, bias)


@settings(
    max_examples=80, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    leading=st.lists(st.integers(0, 9), max_size=3), n=st.integers(1, 90), k=st.integers(1, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    bias=st.booleans(), gelu=st.booleans(), by_columns=st.booleans(), widens=st.booleans(),
    gemm=st.sampled_from([cpu_gemm.BLAS, cpu_gemm.ONEDNN]), block=st.integers(1, 20_000),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_against_float64(
    leading, n, k, dtype, bias, gelu, by_columns, widens, gemm, block, seed, monkeypatch, choose_gemm
):
    monkeypatch.setattr(cpu_gemm, "BLOCK_BYTES", block)
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    choose_gemm(widens, gemm)
    generator = torch.Generator().manual_seed(seed)
    x, weight, offset, incoming = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ([*leading, k], [n, k], [n], [*leading, n])
    )
    offset = offset if bias else None
    weight = weight.T.contiguous().T if by_columns else weight
    results = results_of(frozen_linear, x, weight, offset, incoming, gelu=gelu)
    wide = (t if t is None else t.double() for t in (x, weight, offset, incoming))
    exact = results_of(plain_linear, *wide, gelu=gelu)
    # GELU and its derivative are rounded to the dtype in between
    roundings = (1 if widens else cpu_gemm.NARROW.roundings) + gelu
    for name, got, right, terms in zip(("y", "dx"), results, exact, (k, n), strict=True):
        assert deviations(name, got, right, dtype, operands=dtype, terms=terms, roundings=roundings) == []


def test_opcheck(choose_gemm):
    choose_gemm(widens=False)
    x = torch.randn(2, 3, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    dy = torch.randn(2, 3, 5).bfloat16()
    saved = torch.zeros(2, 3, 5).bfloat16().requires_grad_()
    for gelu in (False, True):
        opcheck(torch.ops.lorakernels.frozen_linear.default, (saved, x.detach(), weight, bias, gelu))
        opcheck(
            torch.ops.lorakernels.frozen_linear_backward.default, (dy, weight, x.detach() if gelu else None)
        )


def test_result_may_be_changed_in_place(choose_gemm):
    choose_gemm(widens=False)
    x, weight = torch.randn(2, 3, 8).requires_grad_(), torch.randn(5, 8)
    (dx,) = torch.autograd.grad(frozen_linear(x, weight).mul_(2).sum(), x)
    torch.testing.assert_close(dx, (2 * weight.sum(0)).expand_as(x))


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_of_gradients_are_refused(gelu, choose_gemm):
    choose_gemm(widens=False)
    x, weight = torch.randn(3, 8).requires_grad_(), torch.randn(5, 8)
    y = frozen_linear(x, weight, gelu=gelu)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^frozen_linear is differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("gelu", [False, True])
def test_nothing_is_saved_but_the_weight_and_what_gelu_needs(gelu, choose_gemm):
    choose_gemm(widens=False)
    x, weight = torch.randn(3, 8).requires_grad_(), torch.randn(5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen_linear(x, weight, gelu=gelu)
    expected = [weight, x] if gelu else [weight]
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in expected]


def test_the_whole_gelu_never_exists(choose_gemm, monkeypatch):
    choose_gemm(widens=False)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4096)
    x, weight = torch.randn(64, 256), torch.randn(16, 256)
    with LargestTensor() as seen:
        y = module._forward(x[:, :16], x, weight, None, True)
    assert seen.elements == 64 * 16
    with LargestTensor() as seen:
        module._backward(y, weight, x)
    assert seen.elements == 64 * 256  # the gradient itself, which is returned


def test_few_rows_take_torchs_own_path(monkeypatch):
    monkeypatch.setattr(cpu_gemm, "fastest", None)
    frozen_linear(torch.randn(1, 1024), torch.randn(4096, 1024), gelu=True)
    with pytest.raises(TypeError):
        frozen_linear(torch.randn(16, 1024), torch.randn(4096, 1024), gelu=True)


@pytest.mark.parametrize(("times", "expected"), [((1.0, 2.0), True), ((1.4, 1.0), True), ((1.6, 1.0), False)])
def test_16_bits_must_win_clearly_and_are_measured_once(times, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    dispatch.use_kernel_choices({cpu_gemm.precision_problem(torch.float32): {"winner": "BLAS"}})
    measured = []

    def seconds(trial, candidate):
        trial.run(candidate)
        measured.append(candidate)
        return times[candidate is cpu_gemm.NARROW]

    monkeypatch.setattr(examination, "host_seconds", seconds)
    assert [cpu_gemm.widens(torch.bfloat16) for _ in range(3)] == [expected] * 3
    assert len(measured) == 2 * examination.ROUNDS
    assert cpu_gemm.precision_problem(torch.bfloat16) in dispatch.kernel_choices()
    assert not cpu_gemm.widens(torch.float32)


def test_a_wrong_precision_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    narrow = cpu_gemm.Gemm("16 bits", lambda x, w, b: x @ w.T + 1, torch.matmul, torch.Tensor.addmm_)
    monkeypatch.setattr(cpu_gemm, "NARROW", narrow)
    with pytest.warns(UserWarning, match="16 bits is not used for frozen products.*y: relative error"):
        assert cpu_gemm.widens(torch.bfloat16)


def test_errors_name_the_argument():
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"weight: .*\[3, 8\], got \[5, 7\]"):
        frozen_linear(x, torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"bias: expected shape \[5\], got \[4\]"):
        frozen_linear(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        frozen_linear(x, weight.requires_grad_())
    with pytest.raises(TypeError, match=r"weight: expected x's dtype torch\.float32, got torch\.float16"):
        frozen_linear(x, torch.zeros(5, 8).half())
