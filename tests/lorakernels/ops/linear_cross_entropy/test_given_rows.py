"""linear_cross_entropy where the caller names the rows: the same result, and nothing is looked for."""

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels import linear_cross_entropy
from tests.lorakernels.ops.linear_cross_entropy.test_linear_cross_entropy import (
    failures,
    make_problem,
    results_of,
    rounds_on_a_cpu,
)


def with_rows(rows):
    return lambda *arguments, **options: linear_cross_entropy(*arguments, rows=rows, **options)


def rows_of(labels, extra: int) -> torch.Tensor:
    """Those with a label and so many others, in order."""
    ignored = (labels == -100).nonzero()[:extra, 0]
    return torch.cat([(labels != -100).nonzero()[:, 0], ignored]).sort().values


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("extra", [0, 5, 99], ids=["exactly", "some", "all"])
def test_results_against_float64(extra, dtype, reduction):
    hidden, weight, labels = make_problem(70, 48, 900, dtype, ignored=0.3)
    given = with_rows(rows_of(labels, extra))
    results = results_of(given, hidden, weight, labels, reduction)
    assert failures(results, hidden, weight, labels, reduction, rounds_on_a_cpu(dtype)) == []
    ignored = labels == -100
    assert not results[1][ignored].any()
    if reduction == "none":
        assert not results[0][ignored].any()


def test_exactly_the_rows_with_a_label_give_the_bits_of_rows_that_were_found():
    hidden, weight, labels = make_problem(70, 48, 900, torch.float32)
    found = results_of(linear_cross_entropy, hidden, weight, labels, "mean")
    given = results_of(with_rows(rows_of(labels, 0)), hidden, weight, labels, "mean")
    assert all(map(torch.equal, found, given))


def test_an_ignored_row_that_is_named_does_not_reach_the_head():
    """Its incoming gradient is not zero for reduction "none"."""
    hidden, weight, labels = make_problem(20, 8, 30, torch.float64, ignored=0.5)
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, leaf, labels, reduction="none", rows=rows_of(labels, 99)).sum().backward()
    again = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, again, labels, reduction="sum").backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=1e-12, atol=1e-14)


def test_no_label_is_read():
    """Neither nonzero nor a value on the host."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator._schema.name)
            return operator(*args, **(kwargs or {}))

    hidden, weight, labels = make_problem(20, 8, 30, torch.float32)
    rows = rows_of(labels, 2)
    body = OPDEFS["lorakernels::linear_cross_entropy"]._init_fn
    with Names():
        body(hidden, weight, labels, -100, True, rows)
        found_before = list(seen)
        seen.clear()
        body(hidden, weight, labels, -100, True)
    waits = {"aten::nonzero", "aten::_local_scalar_dense", "aten::aminmax"}
    assert not waits & set(found_before)
    assert waits & set(seen)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"rows: expected shape \[n\] with n <= 20"),
        (torch.zeros(21, dtype=torch.int64), ValueError, r"rows: expected .* n <= 20, got \[21\]"),
        (torch.zeros(3, dtype=torch.int32), TypeError, "rows: expected torch.int64, got torch.int32"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "rows: expected hidden's device cpu"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, error, message):
    hidden, weight, labels = make_problem(20, 8, 30, torch.float32)
    with pytest.raises(error, match=message):
        linear_cross_entropy(hidden, weight, labels, rows=rows)
