"""A head that is handed over in blocks has the loss and gradient of the whole one."""

import pytest
import torch

from lorakernels import linear_cross_entropy_in_blocks
from lorakernels.ops import linear_cross_entropy as operator
from tests.lorakernels.ops.linear_cross_entropy.test_linear_cross_entropy import (
    exact_loss,
    failures,
    make_problem,
    rounds_on_a_cpu,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NEVER = ("triton", torch.float64)  # Triton's kernels compute in at most float32
SIZES = (128, 1, 300, 171)  # of blocks, the last one the rest


def through_one_buffer(weight, sizes=SIZES, taken=None):
    """Blocks of weight in a buffer that nothing may be read from once the next block is taken."""
    buffer = torch.empty(max(sizes), weight.shape[1], dtype=weight.dtype)
    for part in weight.split(list(sizes)):
        buffer.fill_(torch.nan)
        yield buffer[: len(part)].copy_(part)
        if taken is not None:
            taken.append(len(part))
    buffer.fill_(torch.nan)


def results(hidden, weight, labels, reduction, **options):
    leaf = hidden.detach().requires_grad_()
    loss = linear_cross_entropy_in_blocks(
        leaf, through_one_buffer(weight), labels, reduction=reduction, **options
    )
    incoming = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [loss.detach(), *torch.autograd.grad(loss, leaf, incoming.to(loss))]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("aten", "triton") for dtype in DTYPES if (name, dtype) != NEVER],
)
def test_loss_and_gradient(name, dtype, reduction, monkeypatch):
    if name == "triton":
        triton = pytest.importorskip("lorakernels.ops.linear_cross_entropy.triton")
        monkeypatch.setattr(triton, "BLOCK", 64)
        # three rows at a time in the largest block
        monkeypatch.setattr(triton, "BUFFER_BYTES", 3 * 300 * dtype.itemsize)
        monkeypatch.setattr(operator, "_implementation", lambda hidden: triton)
    hidden, weight, labels = make_problem(40, 24, 600, dtype)
    labels[:4] = torch.tensor([0, 127, 128, 599])  # at the ends of blocks
    found = results(hidden, weight, labels, reduction)
    rounds = (name == "triton" and dtype.itemsize == 2) or rounds_on_a_cpu(dtype)
    assert not failures(found, hidden, weight, labels, reduction, rounds, made=2)
    given = (labels != -100).nonzero()[:, 0]
    assert all(map(torch.equal, results(hidden, weight, labels, reduction, rows=given), found))


@pytest.mark.parametrize("name", ["aten", "triton"])
def test_confident_rows_and_far_maxima_in_the_last_block(name, monkeypatch):
    if name == "triton":
        triton = pytest.importorskip("lorakernels.ops.linear_cross_entropy.triton")
        monkeypatch.setattr(operator, "_implementation", lambda hidden: triton)
    hidden, weight, labels = make_problem(12, 24, 600, torch.float32, ignored=0, sharpness=300.0)
    labels[:6] = (hidden.double() @ weight.double().T).argmax(1)[:6]
    hidden, weight = hidden.sort(0)[0], weight.sort(0)[0]
    found = results(hidden, weight, labels, "none")
    assert not failures(found, hidden, weight, labels, "none", made=2)


def test_every_block_is_taken_where_no_row_has_a_label():
    hidden, weight, labels = make_problem(5, 8, 600, torch.float32)
    taken = []
    loss = linear_cross_entropy_in_blocks(
        hidden.requires_grad_(), through_one_buffer(weight, taken=taken), labels.fill_(-100), reduction="sum"
    )
    assert (loss.item(), torch.autograd.grad(loss, hidden)[0].count_nonzero()) == (0.0, 0)
    assert taken == list(SIZES)


def test_without_a_gradient_none_is_made(monkeypatch):
    hidden, weight, labels = make_problem(7, 8, 600, torch.float32)
    asked = []
    run = operator.aten.forward_in_blocks
    monkeypatch.setattr(
        operator.aten, "forward_in_blocks", lambda *args: (asked.append(args[3]), run(*args))[1]
    )
    with torch.no_grad():
        loss = linear_cross_entropy_in_blocks(hidden.requires_grad_(), [weight], labels)
    torch.testing.assert_close(loss.double(), exact_loss(hidden, weight, labels, "mean").detach())
    linear_cross_entropy_in_blocks(hidden.detach(), [weight], labels)
    linear_cross_entropy_in_blocks(hidden, [weight], labels)
    assert asked == [False, False, True]


def test_under_autocast_blocks_are_cast_as_the_whole_weight():
    hidden, weight, labels = make_problem(9, 16, 600, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(hidden, weight, labels, "none")
    narrow = hidden.bfloat16(), weight.bfloat16()
    expected = results(*narrow, labels, "none")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1].float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, w, labels: (h, [w[:, 1:]], labels), ValueError, "weight: expected shape"),
        (lambda h, w, labels: (h, [w, w[:0]], labels), ValueError, "with V >= 1"),
        (lambda h, w, labels: (h, [w.double()], labels), TypeError, "weight: expected"),
        (lambda h, w, labels: (h, [w.to("meta")], labels), ValueError, "device"),
        (lambda h, w, labels: (h, [], labels), ValueError, "blocks: expected at least one"),
        (lambda h, w, labels: (h, [w], labels + 600), ValueError, "labels: expected 0..599"),
        (lambda h, w, labels: (h, [w], labels - 600), ValueError, "labels: expected 0..599"),
        (lambda h, w, labels: (h, [w], labels[1:]), ValueError, "labels: expected shape"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy_in_blocks(*change(*make_problem(6, 8, 600, torch.float32, ignored=0)))


def test_no_gradient_of_the_gradient():
    hidden, weight, labels = make_problem(6, 8, 600, torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy_in_blocks(hidden, [weight], labels) ** 2
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
