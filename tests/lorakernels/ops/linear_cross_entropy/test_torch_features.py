"""linear_cross_entropy among torch's own operators: opcheck, compile, autocast, checkpointing, errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from benchmarks.baselines.cross_entropy import full_logits
from lorakernels import linear_cross_entropy


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_problem(rows, width=16, vocabulary=300, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck_of_the_forward(dtype, trained, with_gradient):
    hidden, weight, labels = make_problem(9, dtype=dtype)
    hidden.requires_grad_(with_gradient)
    weight.requires_grad_(trained)
    opcheck(torch.ops.lorakernels.linear_cross_entropy.default, (hidden, weight, labels, -100, with_gradient))


def test_opcheck_of_the_backward():
    hidden, weight, labels = make_problem(9)
    operators = torch.ops.lorakernels
    losses, statistics, unscaled = operators.linear_cross_entropy(hidden.detach(), weight, labels, -100, True)
    scale = torch.rand(9)
    opcheck(
        operators.linear_cross_entropy_hidden_backward.default,
        (scale, unscaled, labels, -100, torch.bfloat16),
    )
    opcheck(
        operators.linear_cross_entropy_weight_backward.default,
        (scale, hidden.detach(), weight, labels, losses, statistics, -100),
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_once_for_every_length(compiler):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=counter)
    for step, rows in enumerate((7, 12, 33, 5)):
        hidden, weight, labels = make_problem(rows)
        weight.requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            loss = compiled(hidden, weight, labels)
        gradients = torch.autograd.grad(loss, [hidden, weight])
        plain = linear_cross_entropy(hidden, weight, labels)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(gradients, torch.autograd.grad(plain, [hidden, weight]))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("trained", [False, True])
def test_autocast(trained):
    hidden, weight, labels = make_problem(9)
    weight.requires_grad_(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    inside = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, inside)
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    assert not trained or weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same(reentrant):
    hidden, weight, labels = make_problem(9)
    checkpointed = checkpoint(linear_cross_entropy, hidden, weight, labels, use_reentrant=reentrant)
    (got,) = torch.autograd.grad(checkpointed, hidden) if not reentrant else (None,)
    if reentrant:
        checkpointed.backward()
        got = hidden.grad
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    assert torch.equal(got, expected)


def test_a_frozen_head_keeps_only_the_gradient():
    """hidden and weight are not held for the backward pass: the gradient is already there."""
    hidden, weight, labels = make_problem(9)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert hidden.untyped_storage().data_ptr() not in storages
    assert weight.untyped_storage().data_ptr() not in storages


def test_gradients_of_gradients_are_refused():
    hidden, weight, labels = make_problem(9)
    loss = linear_cross_entropy(hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_any_strides_and_integer_labels():
    hidden, weight, labels = make_problem(12)
    strided = hidden.detach().T.contiguous().T
    got = linear_cross_entropy(strided, weight.T.contiguous().T, labels.to(torch.int32))
    torch.testing.assert_close(got, full_logits(hidden, weight, labels))


ERRORS = {
    "hidden": (ValueError, r"hidden: .*\[T, H\], got \[2, 5, 16\]", {"hidden": torch.zeros(2, 5, 16)}),
    "weight": (ValueError, r"weight: .*\[V, 16\].*, got \[300, 15\]", {"weight": torch.zeros(300, 15)}),
    "no vocabulary": (ValueError, r"weight: .*V >= 1, got \[0, 16\]", {"weight": torch.zeros(0, 16)}),
    "labels": (ValueError, r"labels: expected shape \[9\], got \[8\]", {"labels": torch.zeros(8).long()}),
    "float labels": (TypeError, "labels: expected integers, got torch.float32", {"labels": torch.zeros(9)}),
    "too high": (ValueError, "labels: expected 0..299 .* to 300", {"labels": torch.full((9,), 300)}),
    "too low": (ValueError, "labels: expected 0..299 .* from -1", {"labels": torch.full((9,), -1)}),
    "dtypes": (TypeError, "weight: expected hidden's dtype", {"weight": torch.zeros(300, 16).half()}),
    "integers": (TypeError, "hidden: .* got torch.int64", {"hidden": torch.zeros(9, 16).long()}),
    "device": (ValueError, "labels: .* device cpu", {"labels": torch.zeros(9, device="meta").long()}),
    "reduction": (ValueError, "reduction: .* got 'average'", {"reduction": "average"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    error, message, changed = ERRORS[name]
    hidden, weight, labels = make_problem(9)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | changed
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_opcheck_of_given_rows():
    hidden, weight, labels = make_problem(9)
    weight.requires_grad_()
    rows = (labels != -100).nonzero()[:, 0]
    operators = torch.ops.lorakernels
    opcheck(operators.linear_cross_entropy.default, (hidden, weight, labels, -100, True, rows))
    hidden, weight = hidden.detach(), weight.detach()
    losses, statistics, _ = operators.linear_cross_entropy(hidden, weight, labels, -100, True, rows)
    opcheck(
        operators.linear_cross_entropy_weight_backward.default,
        (torch.rand(9), hidden, weight, labels, losses, statistics, -100, rows),
    )
