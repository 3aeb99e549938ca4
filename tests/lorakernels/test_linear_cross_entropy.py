"""Losses and gradients of linear_cross_entropy against float64, on the CPU and by the Triton kernels."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.baselines.cross_entropy import full_logits
from lorakernels import cpu_gemm, linear_cross_entropy
from lorakernels.ops.linear_cross_entropy import aten
from lorakernels.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from lorakernels.tolerance import error_bound, relative_error
from tests.lorakernels.largest_tensor import LargestTensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REPEATABLE = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


def make_problem(rows, width, vocabulary, dtype, *, seed=0, ignored=0.2, sharpness=2.0, device="cpu"):
    """hidden, weight and labels; a sharpness of 2 spreads the logits by about 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator) * sharpness
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def results_of(function, hidden, weight, labels, reduction):
    """The loss and the gradients of hidden and weight."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    loss = function(*leaves, labels, reduction=reduction)
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def failures(results, hidden, weight, labels, reduction):
    """One line for each result that is further from float64 than the rule allows."""
    exact = results_of(full_logits, hidden.double(), weight.double(), labels, reduction)
    plain = results_of(full_logits, hidden, weight, labels, reduction)
    lines = []
    for name, got, yardstick, right in zip(
        ("loss", "dhidden", "dweight"), results, plain, exact, strict=True
    ):
        error = relative_error(got, right)
        bound = error_bound(relative_error(yardstick, right), yardstick.dtype, right.numel())
        if hidden.dtype == torch.float64:
            bound = 1e-13  # exact and plain are one computation there, whose own error is unknown
        if got.dtype != yardstick.dtype:
            lines.append(f"{name}: {got.dtype} in place of {yardstick.dtype}")
        if not error <= bound:
            lines.append(f"{name}: relative error {error:.3g} above the bound {bound:.3g}")
    return lines


def room_results(room, hidden, weight, labels, reduction):
    """What the operator does around a room, for rooms that it would not choose on this device."""
    kept = (labels != -100).nonzero()[:, 0]
    losses, statistics, unscaled = room.forward(hidden[kept], weight, labels[kept], True)
    all_losses = losses.new_zeros(len(labels)).index_copy(0, kept, losses)
    count = len(kept) if reduction == "mean" else 1
    loss = all_losses if reduction == "none" else all_losses.sum() / count
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    scale = (incoming / count).expand(len(labels))[kept]
    hidden_gradient = torch.zeros_like(hidden)
    hidden_gradient[kept] = (unscaled * scale[:, None]).to(hidden.dtype)
    weight_gradient = room.weight_gradient(hidden[kept], weight, labels[kept], losses, statistics, scale)
    return [loss, hidden_gradient, weight_gradient]


@pytest.fixture
def triton_room(monkeypatch):
    from lorakernels.ops.linear_cross_entropy import triton

    monkeypatch.setattr(triton, "BLOCK", 256)
    return triton


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_against_float64(dtype, reduction):
    problem = make_problem(70, 48, 9001, dtype)
    results = results_of(linear_cross_entropy, *problem, reduction)
    assert failures(results, *problem, reduction) == []


# a result of few numbers can be right by luck in the plain expression: hence a width of at least 8
@settings(max_examples=50, **REPEATABLE)
@given(
    rows=st.integers(1, 90), width=st.integers(8, 60), vocabulary=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES), reduction=st.sampled_from(["mean", "sum", "none"]),
    columns=st.integers(1, 800), chunk=st.integers(1, 100), sharpness=st.sampled_from([0.1, 1.0, 10.0]),
    widens=st.booleans(), gemm=st.sampled_from([cpu_gemm.BLAS, cpu_gemm.ONEDNN]), seed=st.integers(0, 99),
)  # fmt: skip
def test_operator_on_any_problem(
    rows,
    width,
    vocabulary,
    dtype,
    reduction,
    columns,
    chunk,
    sharpness,
    widens,
    gemm,
    seed,
    monkeypatch,
    choose_gemm,
):
    widens |= rows < 4  # for the same reason, where logits are rounded to 16 bits
    monkeypatch.setattr(aten, "COLUMNS", columns)
    monkeypatch.setattr(aten, "BUFFER_BYTES", chunk * columns * 4)
    choose_gemm(widens, gemm)
    problem = make_problem(rows, width, vocabulary, dtype, seed=seed, sharpness=sharpness)
    problem[2][0] = 0
    results = results_of(linear_cross_entropy, *problem, reduction)
    assert failures(results, *problem, reduction) == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_triton_against_float64(dtype, reduction, triton_room, device):
    problem = make_problem(33, 40, 1000, dtype, device=device)
    assert failures(room_results(triton_room, *problem, reduction), *problem, reduction) == []


@settings(max_examples=12, **REPEATABLE)
@given(
    rows=st.integers(1, 20), width=st.integers(8, 40), vocabulary=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES[:3]), chunk=st.integers(1, 30), sharpness=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_triton_on_any_problem(
    rows, width, vocabulary, dtype, chunk, sharpness, seed, triton_room, monkeypatch, device
):
    monkeypatch.setattr(triton_room, "BUFFER_BYTES", chunk * vocabulary * dtype.itemsize)
    problem = make_problem(rows, width, vocabulary, dtype, seed=seed, sharpness=sharpness, device=device)
    problem[2][0] = 0
    assert failures(room_results(triton_room, *problem, "sum"), *problem, "sum") == []


def test_reference_is_the_plain_expression():
    hidden, weight, labels = make_problem(9, 8, 30, torch.bfloat16)
    got = linear_cross_entropy_reference(hidden, weight, labels, -100, "mean")
    assert torch.equal(got, full_logits(hidden, weight, labels))


@pytest.mark.parametrize("room", ["aten", "triton"])
def test_a_confident_model_loses_no_digits(room, triton_room, device):
    """Losses down to 1e-17 and the gradients that go with them, where 1 - p has no digits in float32."""
    weight = torch.eye(40, device=device)
    labels = torch.arange(40, device=device)
    hidden = torch.diag(torch.linspace(5, 42, 40, device=device))
    losses, _, gradient = (aten if room == "aten" else triton_room).forward(hidden, weight, labels, True)
    exact_losses, _, exact_gradient = aten.forward(hidden.double(), weight.double(), labels, True)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-30)


def test_ignored_rows_are_not_looked_at():
    hidden, weight, labels = make_problem(20, 16, 50, torch.float32, ignored=0.5)
    clean = results_of(linear_cross_entropy, hidden, weight, labels, "mean")
    hidden[labels == -100] = torch.nan
    dirty = results_of(linear_cross_entropy, hidden, weight, labels, "mean")
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not dirty[1][labels == -100].any()


def test_another_ignore_index():
    hidden, weight, labels = make_problem(20, 16, 5, torch.float32, ignored=0.0)
    got = linear_cross_entropy(hidden, weight, labels, ignore_index=3)
    torch.testing.assert_close(got, full_logits(hidden, weight, labels, ignore_index=3))


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_supervised_row(rows, reduction):
    hidden, weight, labels = make_problem(rows, 8, 30, torch.float32, ignored=2.0)
    results = results_of(linear_cross_entropy, hidden, weight, labels, reduction)
    expected = results_of(full_logits, hidden, weight, labels, reduction)
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)
    assert bool(results[0].isnan().any()) == (reduction == "mean")


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    hidden, weight, labels = make_problem(64, 16, 200, torch.float32)
    whole = results_of(linear_cross_entropy, hidden, weight, labels, "mean")
    count = (labels != -100).sum()

    def cut(hidden, weight, labels, reduction):
        parts = zip(hidden.split([3, 40, 21]), labels.split([3, 40, 21]), strict=True)
        return sum(linear_cross_entropy(h, weight, y, reduction="sum") for h, y in parts) / count

    for got, right in zip(results_of(cut, hidden, weight, labels, "mean"), whole, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_of_all_logits(with_gradient):
    hidden, weight, labels = make_problem(600, 8, 20_000, torch.bfloat16, ignored=0.0)
    with LargestTensor() as seen:
        losses, statistics, _ = aten.forward(hidden, weight, labels, with_gradient)
    assert seen.elements <= aten.BUFFER_BYTES // 4 < 600 * 20_000
    with LargestTensor() as seen:
        aten.weight_gradient(hidden, weight, labels, losses, statistics, losses)
    assert seen.elements <= aten.BUFFER_BYTES // 4


def test_no_gradient_is_made_that_nobody_asked_for(monkeypatch):
    asked = []
    forward = aten.forward
    monkeypatch.setattr(aten, "forward", lambda *args: asked.append(args[3]) or forward(*args))
    hidden, weight, labels = make_problem(5, 8, 30, torch.float32)
    linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden, weight.clone().requires_grad_(), labels).backward()
    with torch.no_grad():
        linear_cross_entropy(hidden.clone().requires_grad_(), weight, labels)
    assert asked == [False, False, False]
    linear_cross_entropy(hidden.clone().requires_grad_(), weight, labels).backward()
    assert asked[3:] == [True]


def test_two_runs_give_the_same_bits_and_leave_the_inputs():
    problem = make_problem(50, 16, 300, torch.bfloat16)
    before = [tensor.clone() for tensor in problem]
    first, second = (results_of(linear_cross_entropy, *problem, "mean") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, problem, strict=True))


def broken_label(logits, column, label_logit):
    label_logit.copy_(logits.gather(1, column.clamp(0, logits.shape[1] - 1)))


MUTATIONS = {
    "label left in the sums": ("_take_label", broken_label),
    "gradient never added up": ("_accumulate", lambda gemm, total, left, right: None),
    "label not subtracted": ("_put_label", lambda values, column, new: None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_operator_is_caught(mutation, monkeypatch):
    monkeypatch.setattr(aten, "COLUMNS", 64)
    monkeypatch.setattr(aten, *MUTATIONS[mutation])
    problem = make_problem(30, 16, 300, torch.float32)
    results = results_of(linear_cross_entropy, *problem, "mean")
    assert failures(results, *problem, "mean") != []


KERNEL_MUTATIONS = {
    "masked lanes counted": ('mask=column < V, other=-float("inf")', "mask=column < V, other=0.0"),
    "running sum not rescaled": ("total = total * tl.exp(maximum - highest) +", "total = total +"),
    "label not subtracted": ("tl.where(column == label, -others, ", "tl.where(column < 0, -others, "),
    "row gradient dropped": ("gradient *= tl.load(row_gradient_ptr + row)", "gradient *= 1.0"),
    "block offset dropped": ("tl.load(labels_ptr + row) - first_column", "tl.load(labels_ptr + row)"),
}


@pytest.mark.parametrize("mutation", KERNEL_MUTATIONS)
def test_a_broken_kernel_is_caught(mutation, triton_room, tmp_path, monkeypatch, device):
    old, new = KERNEL_MUTATIONS[mutation]
    source = Path(triton_room.__file__).read_text()
    assert old in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    problem = make_problem(12, 16, 300, torch.float32, sharpness=6.0, device=device)
    for room in (broken, triton_room):
        monkeypatch.setattr(room, "BLOCK", 64)
        monkeypatch.setattr(room, "BUFFER_BYTES", 12 * 4 * 128)
    assert failures(room_results(triton_room, *problem, "sum"), *problem, "sum") == []
    assert failures(room_results(broken, *problem, "sum"), *problem, "sum") != []
