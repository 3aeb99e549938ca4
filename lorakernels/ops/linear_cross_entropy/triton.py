"""`linear_cross_entropy` on a GPU: vendor GEMMs around one Triton kernel for the softmax and its gradient.

The forward pass takes as many rows at a time as a buffer of logits allows: logits GEMM, kernel, gradient
GEMM. The kernel reads a row of logits once and writes exp(logit - shift) over it, before the row's sum is
known: the product of these with the head's rows is scaled by row afterwards, in float32. shift is the maximum
of the columns so far when it was last raised; a maximum further above it than the dtype allows raises it, and
what has been written is scaled down, which few rows need. As in `aten`, the label's own logit stays out of
the sums, so that a confident model loses no digits; its row of the head is subtracted apart.
Of a head that is handed over in blocks the same kernel leaves each block's sums as they are.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from lorakernels import dispatch
from lorakernels.launching import launch
from lorakernels.ops.linear_cross_entropy import aten

# Each buffer of logits reads the whole head twice; a small device gives it this share of its memory.
BUFFER_BYTES, BUFFER_SHARE = 384 * 2**20, 1 / 64
BLOCK = 4096
# How far a maximum may lie above the shift: exp() of it is finite in the dtype, and sums of it in float32.
HEADROOM = {torch.float16: 10.0, torch.bfloat16: 60.0, torch.float32: 60.0}


@triton.jit
def linear_cross_entropy_forward_kernel(
    logits_ptr,  # [rows, V], overwritten by exp(logits - shift), 0 at the label
    labels_ptr,  # [rows]
    losses_ptr,  # [rows]; of a part of the columns, the label's logit, 0 where it is in another part
    statistics_ptr,  # [rows, 2]; of a part of the columns, shift and the sum of exp(logit - shift)
    row_stride,
    V,
    HEADROOM: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and softmax statistics of one row of logits, and the softmax of all but the label, unscaled.

    Without ALL_COLUMNS what is known of a part of the columns, V of them, in their place.
    """
    # rows · V passes 2**31
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    # else it might be one of the columns that fill up the last block
    label = tl.where(label < V, label, -1)
    # the lowest float32, not -inf: exp(-inf - -inf) is nan
    shift = tl.full((), -3.4e38, tl.float32)
    total = tl.zeros((), tl.float32)
    label_logit = tl.zeros((), tl.float32)
    column = tl.arange(0, BLOCK)
    following = tl.load(logits_ptr + column, mask=column < V, other=-float("inf"))  # [BLOCK]
    for start in range(0, V, BLOCK):
        logits, column = following.to(tl.float32), start + tl.arange(0, BLOCK)
        # on its way while this block is worked on: after the store it could not be
        following = tl.load(logits_ptr + column + BLOCK, mask=column + BLOCK < V, other=-float("inf"))
        label_logit += tl.sum(tl.where(column == label, logits, 0.0))
        logits = tl.where(column == label, -float("inf"), logits)
        highest = tl.max(logits)
        if highest > shift + HEADROOM:
            decay = tl.exp(shift - highest)
            total *= decay
            if WITH_GRADIENT:
                # what one thread has stored, another one may load
                tl.debug_barrier()
                for before in range(0, start, BLOCK):
                    written = logits_ptr + before + tl.arange(0, BLOCK)
                    weights = tl.load(written).to(tl.float32) * decay
                    tl.store(written, weights.to(logits_ptr.dtype.element_ty))
            shift = highest
        weights = tl.exp(logits - shift)
        total += tl.sum(weights)
        if WITH_GRADIENT:
            tl.store(logits_ptr + column, weights.to(logits_ptr.dtype.element_ty), mask=column < V)
    if not ALL_COLUMNS:
        tl.store(losses_ptr + row, label_logit)
        tl.store(statistics_ptr + 2 * row, shift)
        tl.store(statistics_ptr + 2 * row + 1, total)
        return
    odds = tl.log(tl.maximum(total, 1.2e-38)) + shift - label_logit
    # log(1 + u) with the digits of u that 1 + u drops
    u = tl.exp(-tl.abs(odds))
    step = (1.0 + u) - 1.0
    log1p = tl.where(step == 0.0, u, tl.log(1.0 + u) * (u / tl.where(step == 0.0, 1.0, step)))
    tl.store(losses_ptr + row, tl.maximum(odds, 0.0) + log1p)
    tl.store(statistics_ptr + 2 * row, shift)
    tl.store(statistics_ptr + 2 * row + 1, tl.sigmoid(odds) / tl.maximum(total, 1.2e-38))


@triton.jit
def linear_cross_entropy_backward_kernel(
    logits_ptr,  # [rows, columns] of the vocabulary from first_column on, overwritten by the gradient
    labels_ptr,  # [rows]
    statistics_ptr,  # [rows, 2]
    label_gradient_ptr,  # [rows]
    row_gradient_ptr,  # [rows]
    row_stride,
    first_column,
    columns,
    BLOCK: tl.constexpr,
):
    """row_gradient · (softmax - onehot) of a block of logits, given the softmax statistics of the rows."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row) - first_column
    logits = tl.load(logits_ptr + column, mask=column < columns, other=0.0).to(tl.float32)  # [BLOCK]
    shift, scale = tl.load(statistics_ptr + 2 * row), tl.load(statistics_ptr + 2 * row + 1)
    gradient = tl.exp(logits - shift) * scale
    gradient = tl.where(column == label, tl.load(label_gradient_ptr + row), gradient)
    gradient *= tl.load(row_gradient_ptr + row)
    tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < columns)


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `aten.forward`, for 16- and 32-bit inputs."""
    rows, vocabulary = len(hidden), len(weight)
    chunk = min(rows, _fitting(vocabulary * hidden.element_size(), hidden))
    labels = labels.contiguous()
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    statistics = torch.empty(rows, 2, dtype=torch.float32, device=hidden.device)
    gradient = None
    if with_gradient:
        gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        buffer = _aligned(chunk, vocabulary, hidden)
        for first in range(0, rows, chunk):
            part = slice(first, min(first + chunk, rows))
            logits = buffer[: part.stop - first]
            torch.mm(hidden[part], weight.T, out=logits)
            _exponentiate(logits, labels[part], losses[part], statistics[part], with_gradient, whole=True)
            if gradient is not None:
                _multiply(logits, weight, out=gradient[part])
        # before the labels' rows are taken: all that a model saves for its backward pass is there already
        del buffer, logits
    if gradient is not None:
        gradient.mul_(statistics[:, 1:]).addcmul_(weight[labels], torch.expm1(-losses)[:, None])
    return losses, statistics, gradient


def forward_in_blocks(
    hidden: torch.Tensor, weights: Iterable[torch.Tensor], labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `aten.forward_in_blocks`, for 16- and 32-bit inputs."""
    rows, width = hidden.shape
    maximum, total, label_logit = (
        torch.full((rows, 1), value, dtype=torch.float32, device=hidden.device)
        for value in (torch.finfo(torch.float32).min, 0.0, 0.0)
    )
    found = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    sums = torch.empty(rows, 2, dtype=torch.float32, device=hidden.device)
    mean = None
    if with_gradient:
        mean = torch.zeros(rows, width, dtype=torch.float32, device=hidden.device)
    label_rows = torch.zeros_like(hidden) if with_gradient else hidden[:0]
    if with_gradient:
        weights = aten.taking_rows(weights, labels, label_rows)
    first_column = 0
    for weight in weights:
        chunk = min(rows, _fitting(len(weight) * hidden.element_size(), hidden))
        own_labels = labels - first_column
        with torch.cuda.device_of(hidden):
            buffer = _aligned(chunk, len(weight), hidden)
            product = None if mean is None else torch.empty_like(mean[:chunk])
            for first in range(0, rows, chunk):
                part = slice(first, min(first + chunk, rows))
                logits = buffer[: part.stop - first]
                torch.mm(hidden[part], weight.T, out=logits)
                _exponentiate(logits, own_labels[part], found[part], sums[part], with_gradient, whole=False)
                label_logit[part] += found[part, None]
                shift, sum_of_block = sums[part, :1], sums[part, 1:]
                highest = torch.maximum(maximum[part], shift)
                decay, decay_of_block = (maximum[part] - highest).exp_(), (shift - highest).exp_()
                maximum[part] = highest
                total[part] = total[part] * decay + sum_of_block * decay_of_block
                if mean is not None and product is not None:
                    into = product[: len(logits)]
                    _multiply(logits, weight, out=into)
                    mean[part].mul_(decay).addcmul_(into, decay_of_block)
        first_column += len(weight)
    return aten.finish(maximum, total, label_logit, mean, label_rows)


def weight_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    statistics: torch.Tensor,
    row_gradient: torch.Tensor,
) -> torch.Tensor:
    """As `aten.weight_gradient`: the logits of all rows again, a block of the vocabulary at a time."""
    rows, vocabulary = len(hidden), len(weight)
    columns = min(vocabulary, _fitting(rows * hidden.element_size(), hidden))
    labels, statistics, row_gradient = (one.contiguous() for one in (labels, statistics, row_gradient))
    label_gradient = torch.expm1(-losses)
    result = torch.empty_like(weight)
    with torch.cuda.device_of(hidden):
        buffer = _aligned(rows, columns, hidden)
        for first in range(0, vocabulary, columns):
            block = weight[first : first + columns]
            logits = buffer[:, : len(block)]
            torch.mm(hidden, block.T, out=logits)
            launch(
                linear_cross_entropy_backward_kernel,
                (rows, triton.cdiv(len(block), _block(len(block)))),
                logits,
                labels,
                statistics,
                label_gradient,
                row_gradient,
                logits.stride(0),
                first,
                len(block),
                BLOCK=_block(len(block)),
                num_warps=8,
            )
            result[first : first + columns] = logits.T @ hidden
    return result


def _exponentiate(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    statistics: torch.Tensor,
    with_gradient: bool,
    *,
    whole: bool,
) -> None:
    """Launch `linear_cross_entropy_forward_kernel`; ``whole``: the logits are of every column."""
    launch(
        linear_cross_entropy_forward_kernel,
        (len(logits),),
        logits,
        labels,
        losses,
        statistics,
        logits.stride(0),
        logits.shape[1],
        HEADROOM=HEADROOM[logits.dtype],
        WITH_GRADIENT=with_gradient,
        ALL_COLUMNS=whole,
        BLOCK=_block(logits.shape[1]),
        num_warps=8,
    )


def _fitting(line_bytes: int, like: torch.Tensor) -> int:
    """How many lines of logits fit the buffer on like's device: a multiple of 128 where that many fit.

    Decided by the device's whole memory, not by what is free, so that every run cuts its rows alike.
    """
    size = BUFFER_BYTES
    if like.is_cuda:
        size = min(size, int(BUFFER_SHARE * dispatch.device_properties(like.device).total_memory))
    lines = max(1, size // line_bytes)
    return lines - lines % 128 if lines > 128 else lines


def _aligned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An empty [rows, columns] whose rows start at multiples of 16 elements, for wide loads of any
    vocabulary."""
    stride = triton.cdiv(columns, 16) * 16
    return torch.empty(rows, stride, dtype=like.dtype, device=like.device)[:, :columns]


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(columns))


def _multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    """left @ right into out, float32, so that scaling in the backward pass rounds to 16 bits once."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(left.float() @ right.float())
