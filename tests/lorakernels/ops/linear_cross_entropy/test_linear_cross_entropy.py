"""Losses and gradients of linear_cross_entropy against float64, on the CPU and by the Triton kernels."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.baselines.cross_entropy import full_logits
from lorakernels import cpu_gemm, linear_cross_entropy
from lorakernels.ops.linear_cross_entropy import aten, check
from lorakernels.ops.linear_cross_entropy.reference import exact_losses
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


def exact_loss(hidden, weight, labels, reduction):
    """The reduced loss in float64."""
    losses = exact_losses(hidden, weight, labels)
    if reduction == "none":
        return losses
    return losses.sum() / ((labels != -100).sum() if reduction == "mean" else 1)


def failures(results, hidden, weight, labels, reduction, rounds_products=False, made=3):
    """One line for each of the ``made`` results that is further from float64 than the rule allows."""
    wide = hidden.double(), weight.double()
    return check.failures(
        results,
        results_of(exact_loss, *wide, labels, reduction)[:made],
        hidden.dtype,
        rows=len(hidden),
        width=hidden.shape[1],
        vocabulary=len(weight),
        largest_logit=float((wide[0] @ wide[1].T).abs().max()),
        rounds_products=rounds_products,
    )


def rounds_on_a_cpu(dtype):
    """Whether the operator makes products of this dtype in 16 bits here."""
    return dtype.itemsize == 2 and not cpu_gemm.widens(dtype)


def results_by(implementation, hidden, weight, labels, reduction):
    """What the operator does around an implementation, for those that it would not choose on this device."""
    kept = (labels != -100).nonzero()[:, 0]
    losses, statistics, unscaled = implementation.forward(hidden[kept], weight, labels[kept], True)
    all_losses = losses.new_zeros(len(labels)).index_copy(0, kept, losses)
    count = len(kept) if reduction == "mean" else 1
    loss = all_losses if reduction == "none" else all_losses.sum() / count
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(loss)
    scale = (incoming / count).expand(len(labels))[kept]
    hidden_gradient = torch.zeros_like(hidden)
    hidden_gradient[kept] = (unscaled * scale[:, None]).to(hidden.dtype)
    weight_gradient = implementation.weight_gradient(
        hidden[kept], weight, labels[kept], losses, statistics, scale
    )
    return [loss, hidden_gradient, weight_gradient]


@pytest.fixture
def by_triton(monkeypatch):
    from lorakernels.ops.linear_cross_entropy import triton

    monkeypatch.setattr(triton, "BLOCK", 256)
    return triton


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_against_float64(dtype, reduction):
    problem = make_problem(70, 48, 9001, dtype)
    results = results_of(linear_cross_entropy, *problem, reduction)
    assert failures(results, *problem, reduction, rounds_on_a_cpu(dtype)) == []


# one sum may cancel to nothing: hence a width of at least 8
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
    monkeypatch.setattr(aten, "COLUMNS", columns)
    monkeypatch.setattr(aten, "BUFFER_BYTES", chunk * columns * 4)
    choose_gemm(widens, gemm)
    problem = make_problem(rows, width, vocabulary, dtype, seed=seed, sharpness=sharpness)
    problem[2][0] = 0
    results = results_of(linear_cross_entropy, *problem, reduction)
    assert failures(results, *problem, reduction, rounds_on_a_cpu(dtype)) == []


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_triton_against_float64(dtype, reduction, by_triton, device):
    problem = make_problem(33, 40, 1000, dtype, device=device)
    results = results_by(by_triton, *problem, reduction)
    assert failures(results, *problem, reduction, dtype.itemsize == 2) == []


@settings(max_examples=12, **REPEATABLE)
@given(
    rows=st.integers(1, 20), width=st.integers(8, 40), vocabulary=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES[:3]), chunk=st.integers(1, 30), sharpness=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_triton_on_any_problem(
    rows, width, vocabulary, dtype, chunk, sharpness, seed, by_triton, monkeypatch, device
):
    monkeypatch.setattr(by_triton, "BUFFER_BYTES", chunk * vocabulary * dtype.itemsize)
    problem = make_problem(rows, width, vocabulary, dtype, seed=seed, sharpness=sharpness, device=device)
    problem[2][0] = 0
    results = results_by(by_triton, *problem, "sum")
    assert failures(results, *problem, "sum", dtype.itemsize == 2) == []


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_whose_maximum_keeps_rising_are_right(dtype, by_triton, monkeypatch, device):
    """Logits from -50 to 50 in rising and falling order, a block of 16 at a time."""
    monkeypatch.setattr(by_triton, "BLOCK", 16)
    for sign in (1, -1):
        hidden, weight, labels = make_problem(20, 8, 300, dtype, ignored=0.0, device=device)
        hidden[:, 0], weight[:, 0] = sign, torch.linspace(-50, 50, 300)
        results = results_by(by_triton, hidden, weight, labels, "sum")
        assert failures(results, hidden, weight, labels, "sum", dtype.itemsize == 2) == []


@pytest.mark.parametrize(("memory", "lines"), [(8, 128 * 2**20), (80, 384 * 2**20), (192, 384 * 2**20)])
def test_the_buffer_is_a_share_of_a_small_device(memory, lines, by_triton, monkeypatch):
    properties = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(by_triton.dispatch, "device_properties", lambda _: properties)
    on_gpu = SimpleNamespace(is_cuda=True, device=None)
    assert by_triton._fitting(1, on_gpu) == lines


def refuse(*arguments):
    raise AssertionError("a choice between libraries of a CPU")


def test_off_the_cpu_no_library_of_a_cpu_is_asked_for(monkeypatch):
    """Meta tensors stand for those of a GPU: the path depends on no value and never returns to the CPU."""
    monkeypatch.setattr(cpu_gemm, "fastest", refuse)
    monkeypatch.setattr(aten, "fastest", refuse)
    monkeypatch.setattr(aten, "product_dtype", refuse)
    for dtype in DTYPES:
        hidden, weight, labels = (one.to("meta") for one in make_problem(70, 48, 9001, dtype))
        losses, statistics, gradient = aten.forward(hidden, weight, labels, True)
        weight_gradient = aten.weight_gradient(hidden, weight, labels, losses, statistics, losses)
        assert losses.is_meta
        assert (gradient.shape, weight_gradient.shape) == (hidden.shape, weight.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_products_of_other_devices_are_right(dtype, monkeypatch):
    products = aten._products
    monkeypatch.setattr(aten, "_products", lambda weight: products(weight.to("meta")))
    problem = make_problem(70, 48, 9001, dtype)
    assert failures(results_by(aten, *problem, "none"), *problem, "none") == []


def test_a_gpu_without_triton_takes_aten(monkeypatch):
    module = sys.modules["lorakernels.ops.linear_cross_entropy"]
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "has_triton", lambda: False)
    assert module._implementation(on_gpu) is aten
    monkeypatch.setattr(module, "has_triton", lambda: True)
    assert module._implementation(on_gpu).__name__.endswith("triton")


def test_the_exact_losses_are_those_of_torch():
    problem = make_problem(40, 16, 300, torch.float64)
    exact, theirs = (results_of(loss, *problem, "none") for loss in (exact_loss, full_logits))
    for got, right in zip(exact, theirs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["aten", "triton"])
def test_a_confident_model_loses_no_digits(name, by_triton, device):
    """Losses down to 1e-17 and the gradients that go with them, where 1 - p has no digits in float32."""
    weight = torch.eye(40, device=device)
    labels = torch.arange(40, device=device)
    hidden = torch.diag(torch.linspace(5, 42, 40, device=device))
    losses, _, gradient = (aten if name == "aten" else by_triton).forward(hidden, weight, labels, True)
    exact, _, exact_gradient = aten.forward(hidden.double(), weight.double(), labels, True)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)
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


def test_logits_in_16_bits_are_caught(choose_gemm):
    """As autocast inside the operator would make them: too coarse where the products are those of float32."""
    problem = make_problem(30, 16, 300, torch.bfloat16)
    choose_gemm(False)
    results = results_of(linear_cross_entropy, *problem, "mean")
    assert failures(results, *problem, "mean", rounds_products=True) == []
    assert failures(results, *problem, "mean", rounds_products=False) != []


KERNEL_MUTATIONS = {
    "masked lanes counted": ('mask=column + BLOCK < V, other=-float("inf")', "mask=column < 0, other=0.0"),
    "running sum not scaled down": ("total *= decay", "total *= 1.0"),
    "what is written not scaled down": (".to(tl.float32) * decay", ".to(tl.float32)"),
    "label not subtracted": (".addcmul_(weight[labels], torch.expm1(-losses)[:, None])", ""),
    "row gradient dropped": ("gradient *= tl.load(row_gradient_ptr + row)", "gradient *= 1.0"),
    "block offset dropped": ("tl.load(labels_ptr + row) - first_column", "tl.load(labels_ptr + row)"),
}


@pytest.mark.parametrize("mutation", KERNEL_MUTATIONS)
def test_a_broken_kernel_is_caught(mutation, by_triton, tmp_path, monkeypatch, device):
    old, new = KERNEL_MUTATIONS[mutation]
    source = Path(by_triton.__file__).read_text()
    assert old in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    problem = make_problem(12, 16, 300, torch.float32, sharpness=6.0, device=device)
    for module in (broken, by_triton):
        monkeypatch.setattr(module, "BLOCK", 64)
        monkeypatch.setattr(module, "HEADROOM", {torch.float32: 0.5})
        monkeypatch.setattr(module, "BUFFER_BYTES", 12 * 4 * 128)
    assert failures(results_by(by_triton, *problem, "sum"), *problem, "sum") == []
    assert failures(results_by(broken, *problem, "sum"), *problem, "sum") != []
