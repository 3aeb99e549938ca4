"""frozen_linear against float64, in both precisions; the measurement that chooses between them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from lorakernels import cpu_gemm, dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.lora_linear.check import error_bound, relative_error


def results_of(function, x, weight, bias, incoming):
    x = x.detach().requires_grad_()
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, x, incoming)]


@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    leading=st.lists(st.integers(0, 9), max_size=3), n=st.integers(1, 90), k=st.integers(1, 90),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    bias=st.booleans(), widens=st.booleans(), block=st.integers(1, 20_000), seed=st.integers(0, 99),
)  # fmt: skip
def test_against_float64(leading, n, k, dtype, bias, widens, block, seed, monkeypatch, choose_precision):
    monkeypatch.setattr(cpu_gemm, "BLOCK_BYTES", block)
    choose_precision(widens)
    generator = torch.Generator().manual_seed(seed)
    x, weight, offset, incoming = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ([*leading, k], [n, k], [n], [*leading, n])
    )
    offset = offset if bias else None
    results = results_of(cpu_gemm.frozen_linear, x, weight, offset, incoming)
    plain = results_of(torch.nn.functional.linear, x, weight, offset, incoming)
    wide = (t if t is None else t.double() for t in (x, weight, offset, incoming))
    exact = results_of(torch.nn.functional.linear, *wide)
    for got, yardstick, right in zip(results, plain, exact, strict=True):
        assert got.dtype == dtype
        bound = error_bound(relative_error(yardstick, right), dtype, right.numel())
        assert relative_error(got, right) <= bound


def test_opcheck():
    x = torch.randn(2, 3, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    opcheck(torch.ops.lorakernels.frozen_linear.default, (x, weight, bias))
    opcheck(torch.ops.lorakernels.frozen_linear_backward.default, (torch.randn(2, 3, 5).bfloat16(), weight))


def test_only_the_weight_is_saved():
    x, weight = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(5, 8).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cpu_gemm.frozen_linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


@pytest.mark.parametrize(("times", "expected"), [((1.0, 2.0), True), ((1.4, 1.0), True), ((1.6, 1.0), False)])
def test_16_bits_must_win_clearly_and_are_measured_once(times, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    measured = []

    def seconds(trial, candidate):
        trial.run(candidate)
        measured.append(candidate)
        return times[candidate is cpu_gemm.NARROW]

    monkeypatch.setattr(dispatch, "_time", seconds)
    assert [cpu_gemm.widens(torch.bfloat16) for _ in range(3)] == [expected] * 3
    assert len(measured) == 2 * dispatch.ROUNDS
    assert list(dispatch.choices()) == [cpu_gemm.precision_problem(torch.bfloat16)]
    assert not cpu_gemm.widens(torch.float32)


def test_a_wrong_precision_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        cpu_gemm, "NARROW", Implementation("16 bits", lambda x, w, b: x @ w.T + 1, torch.matmul)
    )
    with pytest.warns(UserWarning, match="16 bits is not used for frozen products.*y: relative error"):
        assert cpu_gemm.widens(torch.bfloat16)


def test_errors_name_the_argument():
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"weight: .*\[3, 8\], got \[5, 7\]"):
        cpu_gemm.frozen_linear(x, torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"bias: expected shape \[5\], got \[4\]"):
        cpu_gemm.frozen_linear(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        cpu_gemm.frozen_linear(x, weight.requires_grad_())
    with pytest.raises(TypeError, match=r"weight: expected x's dtype torch\.float32, got torch\.float16"):
        cpu_gemm.frozen_linear(x, torch.zeros(5, 8).half())
