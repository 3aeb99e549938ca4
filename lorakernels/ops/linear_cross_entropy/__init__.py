"""Cross entropy of a linear head over a large vocabulary, without the logits of all rows.

With ``logits = hidden @ weight.T`` and ``p = softmax(logits)``, a row's loss is ``logsumexp(logits) -
logits[label]`` and its gradients are ``d loss / d hidden = (p - onehot) @ weight`` and ``d loss / d weight
= (p - onehot)ᵀ hidden``. The first is made in the forward pass, before it is known how the loss is reduced,
and scaled in the backward pass. The second needs the incoming gradient of every row: the backward pass
makes the logits again, a block at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import torch
from torch.autograd.function import once_differentiable

from lorakernels.installed import has_triton
from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.autograd import differentiable_once
from lorakernels.ops.linear_cross_entropy import aten
from lorakernels.tolerance import accumulation_dtype

__all__ = ["linear_cross_entropy", "linear_cross_entropy_in_blocks"]

# Losses, statistics and, if asked, the unscaled gradient, as `aten.forward` returns them.
_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.cross_entropy(hidden @ weight.T, labels)`` that never holds a [T, V] tensor.

    hidden [T, H] and weight [V, H] share a floating dtype (under autocast both are cast to its dtype);
    labels [T] are integers in 0..V-1 or ignore_index. Rows with ignore_index are dropped before any matrix
    product. The result is float32, float64 for float64 inputs: a scalar for reduction "mean" (over the rows
    that are not ignored) and "sum", [T] with 0 for ignored rows for "none". Where every row is ignored
    "mean" is nan and the gradients are zero, as in `F.cross_entropy`. Both hidden and weight may require a
    gradient; each is made only if it is asked for, and gradients of gradients raise RuntimeError.

    On a GPU the operator waits for the device to learn which rows have a label. ``rows``, int64 [n] on
    hidden's device, tells it: indices without repetition that name every row with a label, and as many
    ignored rows as the caller likes, whose loss and gradient are zero if their hidden states are finite.
    Neither they nor the labels are checked then.

    Raises TypeError for labels or rows that are not integers and for mixed or non-floating dtypes, ValueError
    for shapes that do not fit, labels out of range and an unknown reduction.
    """
    _check(hidden, labels, reduction, rows)
    hidden, weight = cast_for_autocast(hidden, weight)
    _check_weight(hidden, weight)
    labels = labels.long()
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    losses, _, _ = _forward(hidden, weight, labels, ignore_index, with_gradient, rows)
    return _reduced(losses, labels, ignore_index, reduction)


def linear_cross_entropy_in_blocks(
    hidden: torch.Tensor,
    blocks: Iterable[torch.Tensor],
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` for a frozen weight that is nowhere whole, such as one spread over devices.

    ``blocks`` yields the rows of weight in order, [n, H] on hidden's device with n >= 1. Each is used up
    before the next is taken, so all may lie in one buffer, and all are taken, once, whatever the labels are.
    Every other argument, the result and the errors are those of `linear_cross_entropy`.
    """
    _check(hidden, labels, reduction, rows)
    (hidden,) = cast_for_autocast(hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        # taken one by one in a body without autocast
        blocks = (block if block.dtype == torch.float64 else block.to(hidden.dtype) for block in blocks)
    labels = labels.long()
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad
    losses = _InBlocks.apply(hidden, blocks, labels, ignore_index, with_gradient, rows)
    return _reduced(losses, labels, ignore_index, reduction)


def _reduced(losses: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum()


def _check(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    reduction: str,
    index: torch.Tensor | None,
) -> None:
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape [T, H], got {list(hidden.shape)}")
    rows = len(hidden)
    if labels.ndim != 1 or labels.shape[0] != rows:
        raise ValueError(f"labels: expected shape [{rows}], got {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if index is not None and (index.ndim != 1 or len(index) > rows):
        raise ValueError(f"rows: expected shape [n] with n <= {rows}, got {list(index.shape)}")
    if index is not None and index.dtype != torch.int64:
        raise TypeError(f"rows: expected torch.int64, got {index.dtype}")
    for name, tensor in (("labels", labels), ("rows", index)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {tensor.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")


def _check_weight(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    width = hidden.shape[1]
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, {width}] with V >= 1, got {list(weight.shape)}")
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected hidden's device {hidden.device}, got {weight.device}")
    if hidden.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"hidden: expected float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")


def _implementation(hidden: torch.Tensor) -> ModuleType:
    if hidden.is_cuda and hidden.dtype != torch.float64 and has_triton():
        from lorakernels.ops.linear_cross_entropy import triton

        return triton
    return aten


def _supervised(labels: torch.Tensor, ignore_index: int, vocabulary: int) -> torch.Tensor:
    """Indices of the rows to keep. Waits for the device twice: for their number and to check their labels."""
    index = (labels != ignore_index).nonzero()[:, 0]
    _check_labels(labels[index], ignore_index, vocabulary)
    return index


def _check_labels(labels: torch.Tensor, ignore_index: int, vocabulary: int) -> None:
    if len(labels) == 0:
        return
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"labels: expected 0..{vocabulary - 1} or ignore_index {ignore_index}, "
            f"got values from {lowest} to {highest}"
        )


def _rows(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor if len(index) == len(tensor) else tensor[index]


def _spread(values: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    if len(values) == rows:
        return values
    return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, index, values)


@torch.library.custom_op("lorakernels::linear_cross_entropy", mutates_args=())
@without_autocast
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    with_gradient: bool,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses [T], softmax statistics [T, 2] and the unscaled gradient [T, H] ([0, H] without).

    All are zero in ignored rows; in those that ``given`` names, the losses alone.
    """
    index = _supervised(labels, ignore_index, len(weight)) if given is None else given

    def compute(hidden: torch.Tensor, labels: torch.Tensor) -> _Results:
        return _implementation(hidden).forward(hidden, weight, labels, with_gradient)

    return _of_supervised(hidden, labels, ignore_index, with_gradient, index, given is not None, compute)


def _of_supervised(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    with_gradient: bool,
    index: torch.Tensor,
    given: bool,
    compute: Callable[[torch.Tensor, torch.Tensor], _Results],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results of `_forward`, from those that ``compute`` has for the rows of ``index``.

    These may be ignored ones where index was ``given``.
    """
    rows = len(hidden)
    if len(index) == 0:
        losses = hidden.new_zeros(rows, dtype=accumulation_dtype(hidden.dtype))
        unscaled = losses.new_zeros(rows if with_gradient else 0, hidden.shape[1])
        return losses, losses.new_zeros(rows, 2), unscaled
    hidden, labels = _rows(hidden, index), _rows(labels, index)
    ignored = labels == ignore_index if given else None
    if ignored is not None:
        # any valid one: ignore_index itself is no column
        labels = labels.masked_fill(ignored, 0)
    losses, statistics, gradient = compute(hidden, labels)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0.0)
    losses, statistics = _spread(losses, index, rows), _spread(statistics, index, rows)
    if gradient is None:
        return losses, statistics, losses.new_empty(0, hidden.shape[1])
    return losses, statistics, _spread(gradient, index, rows)


@_forward.register_fake
def _(hidden, weight, labels, ignore_index, with_gradient, given=None):
    dtype = accumulation_dtype(hidden.dtype)
    losses = hidden.new_empty(hidden.shape[0], dtype=dtype)
    gradient = hidden.new_empty(hidden.shape[0] if with_gradient else 0, hidden.shape[1], dtype=dtype)
    return losses, losses.new_empty(hidden.shape[0], 2), gradient


@torch.library.custom_op("lorakernels::linear_cross_entropy_hidden_backward", mutates_args=())
@without_autocast
def _hidden_backward(
    row_gradient: torch.Tensor,
    unscaled: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """row_gradient[t] · unscaled[t], rounded once; zero in ignored rows, whatever their row_gradient is."""
    scale = row_gradient.masked_fill(labels == ignore_index, 0.0)
    return (unscaled * scale[:, None]).to(dtype)


@_hidden_backward.register_fake
def _(row_gradient, unscaled, labels, ignore_index, dtype):
    return unscaled.new_empty(unscaled.shape, dtype=dtype)


@torch.library.custom_op("lorakernels::linear_cross_entropy_weight_backward", mutates_args=())
@without_autocast
def _weight_backward(
    row_gradient: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    statistics: torch.Tensor,
    ignore_index: int,
    given: torch.Tensor | None = None,
) -> torch.Tensor:
    index = _supervised(labels, ignore_index, len(weight)) if given is None else given
    if len(index) == 0:
        return torch.zeros_like(weight)
    row_gradient = row_gradient.masked_fill(labels == ignore_index, 0.0)
    parts = (_rows(part, index) for part in (hidden, labels, losses, statistics, row_gradient))
    hidden, labels, losses, statistics, row_gradient = parts
    implementation = _implementation(hidden)
    return implementation.weight_gradient(hidden, weight, labels, losses, statistics, row_gradient)


@_weight_backward.register_fake
def _(row_gradient, hidden, weight, labels, losses, statistics, ignore_index, given=None):
    return torch.empty_like(weight)


def _save(ctx, inputs, output):
    hidden, weight, labels, ctx.ignore_index, _, rows = inputs
    losses, statistics, unscaled = output
    # callers do not get statistics and unscaled, so no zeros stand for their gradients; not marked
    # non-differentiable, so that a gradient of the gradient is refused
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    trained = ctx.needs_input_grad[1]
    ctx.save_for_backward(labels, unscaled, *((hidden, weight, losses, statistics, rows) if trained else ()))


def _backward(ctx, row_gradient, _statistics_gradient, _unscaled_gradient):
    labels, unscaled, *head = ctx.saved_tensors
    hidden_gradient = weight_gradient = None
    if ctx.needs_input_grad[0]:
        hidden_gradient = _hidden_backward(row_gradient, unscaled, labels, ctx.ignore_index, ctx.dtype)
    if head:
        hidden, weight, losses, statistics, rows = head
        weight_gradient = _weight_backward(
            row_gradient, hidden, weight, labels, losses, statistics, ctx.ignore_index, rows
        )
    return hidden_gradient, weight_gradient, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
_hidden_backward.register_autograd(differentiable_once("linear_cross_entropy"))
_weight_backward.register_autograd(differentiable_once("linear_cross_entropy"))


class _InBlocks(torch.autograd.Function):
    """`_forward` for a weight in blocks, which no operator of torch takes, and without its gradient."""

    @staticmethod
    def forward(ctx, hidden, blocks, labels, ignore_index, with_gradient, given):
        losses, unscaled = _forward_in_blocks(hidden, blocks, labels, ignore_index, with_gradient, given)
        ctx.save_for_backward(labels, unscaled)
        ctx.ignore_index, ctx.dtype = ignore_index, hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, row_gradient):
        labels, unscaled = ctx.saved_tensors
        gradient = _hidden_backward(row_gradient, unscaled, labels, ctx.ignore_index, ctx.dtype)
        return gradient, None, None, None, None, None


@without_autocast
def _forward_in_blocks(
    hidden: torch.Tensor,
    blocks: Iterable[torch.Tensor],
    labels: torch.Tensor,
    ignore_index: int,
    with_gradient: bool,
    given: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [T] and the unscaled gradient [T, H] ([0, H] without); takes every block."""
    columns = 0

    def checked() -> Iterator[torch.Tensor]:
        nonlocal columns
        for block in blocks:
            _check_weight(hidden, block)
            columns += len(block)
            yield block

    weights = checked()

    def compute(hidden: torch.Tensor, labels: torch.Tensor) -> _Results:
        return _implementation(hidden).forward_in_blocks(hidden, weights, labels, with_gradient)

    index = (labels != ignore_index).nonzero()[:, 0] if given is None else given
    losses, _, unscaled = _of_supervised(
        hidden, labels, ignore_index, with_gradient, index, given is not None, compute
    )
    for _ in weights:
        pass  # nothing has a label, but others may wait for the blocks to be taken
    if columns == 0:
        raise ValueError("blocks: expected at least one")
    if given is None:
        _check_labels(labels[index], ignore_index, columns)
    return losses, unscaled
