"""`linear_cross_entropy` in ATen operations: one pass over the vocabulary, a block of logits at a time.

The gradient of the hidden states is a softmax-weighted mean of the head's rows, which is attention with the
head as keys and values; so the running-maximum scheme of Milakov and Gimelshein (2018, arXiv:1805.02867)
makes the loss and the gradient from each block of the head while it is in cache. The label's own logit
stays out of the running sums: with ``z = log(sum of the other exponentials) - label's logit`` the loss is
``softplus(z)`` and the gradient ``sigmoid(z) · (mean of the other rows - label's row)``, and neither loses
digits when the model is confident.
"""

from collections.abc import Iterable, Iterator

import torch

from lorakernels.cpu_gemm import BLAS, Gemm, fastest, product_dtype, weight_blocks
from lorakernels.tolerance import accumulation_dtype

BUFFER_BYTES = 16 * 2**20
COLUMNS = 4096


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """How many rows of logits fit the buffer beside `columns` columns; at least 1."""
    return max(1, BUFFER_BYTES // (columns * dtype.itemsize))


def forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses [T], softmax statistics [T, 2] and, if asked, d loss / d hidden [T, H], all unreduced.

    hidden [T, H] and weight [V, H] of one dtype, labels [T] all valid. The results are in
    `accumulation_dtype`. The statistics (shift, scale) give the softmax of every column but the label's as
    exp(logit - shift) · scale: one number, their log-sum-exp, would be rounded by more than the two.
    """
    sums = _sums(hidden, [weight], labels, with_gradient)
    return finish(*sums, weight[labels] if with_gradient else weight[:0])


def forward_in_blocks(
    hidden: torch.Tensor, weights: Iterable[torch.Tensor], labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `forward`; ``weights`` are the rows of weight in order, each used up before the next is taken."""
    label_rows = torch.zeros_like(hidden) if with_gradient else hidden[:0]
    if with_gradient:
        weights = taking_rows(weights, labels, label_rows)
    return finish(*_sums(hidden, weights, labels, with_gradient), label_rows)


def _sums(
    hidden: torch.Tensor, weights: Iterable[torch.Tensor], labels: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `finish` takes, but for label_rows."""
    rows, width = hidden.shape
    dtype = accumulation_dtype(hidden.dtype)
    gemm, compute = _products(hidden)
    states = hidden.to(compute)
    maximum = states.new_full((rows, 1), torch.finfo(dtype).min, dtype=dtype)
    total = torch.zeros_like(maximum)
    label_logit = torch.zeros_like(maximum)
    mean = states.new_zeros((rows, width) if with_gradient else (0,), dtype=dtype)
    first_column = 0
    for weight in weights:
        columns = min(COLUMNS, len(weight))
        chunk = min(rows, block_rows(columns, dtype))
        for start, _, block in weight_blocks(weight, columns, compute):
            for first in range(0, rows, chunk):
                part = slice(first, min(first + chunk, rows))
                logits = gemm.forward(states[part], block, None).to(dtype)
                _take_label(logits, labels[part, None] - first_column - start, label_logit[part])
                highest = torch.maximum(maximum[part], logits.amax(dim=1, keepdim=True))
                decay = (maximum[part] - highest).exp_()
                maximum[part] = highest
                weights_of_block = logits.sub_(highest).exp_()
                total[part] = total[part].mul_(decay) + weights_of_block.sum(dim=1, keepdim=True)
                if with_gradient:
                    _accumulate(gemm, mean[part].mul_(decay), weights_of_block, block)
                # so that the next block can reuse their memory
                del logits, weights_of_block
        first_column += len(weight)
    return maximum, total, label_logit, mean if with_gradient else None


def finish(
    maximum: torch.Tensor,
    total: torch.Tensor,
    label_logit: torch.Tensor,
    mean: torch.Tensor | None,
    label_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The results of `forward` from sums over all columns but the label's.

    total [T, 1] sums exp(logit - maximum), mean [T, H], overwritten, that times the head's rows; label_rows
    [T, H] are the labels' own.
    """
    total.clamp_(min=torch.finfo(total.dtype).tiny)
    odds = total.log().add_(maximum).sub_(label_logit)
    losses = torch.logaddexp(odds, torch.zeros_like(odds))
    others = odds.sigmoid_()
    if mean is not None:
        mean.div_(total).sub_(label_rows).mul_(others)
    return losses[:, 0], torch.cat([maximum, others / total], dim=1), mean


def taking_rows(
    weights: Iterable[torch.Tensor], labels: torch.Tensor, out: torch.Tensor
) -> Iterator[torch.Tensor]:
    """``weights``; of each block the labels' rows are written to out [T, H]. No device is waited for."""
    first_column = 0
    for weight in weights:
        index = labels - first_column
        inside = (index >= 0) & (index < len(weight))
        found = weight[torch.where(inside, index, 0)]
        torch.where(inside[:, None], found, out, out=out)
        yield weight
        first_column += len(weight)


def weight_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    statistics: torch.Tensor,
    row_gradient: torch.Tensor,
) -> torch.Tensor:
    """``sum over t of row_gradient[t] · (softmax - onehot)[t]ᵀ hidden[t]``, [V, H]; logits are made again."""
    dtype = accumulation_dtype(hidden.dtype)
    gemm, compute = _products(weight)
    # A 16-bit product would be rounded for each chunk of rows: the sum over rows is taken wide.
    states, wide_states = hidden.to(compute), hidden.to(dtype)
    result = torch.empty_like(weight)
    columns = min(COLUMNS, len(weight))
    chunk = min(len(hidden), block_rows(columns, dtype))
    gradient_buffer = torch.empty(columns, hidden.shape[1], dtype=dtype, device=states.device)
    shift, scale = statistics[:, :1], statistics[:, 1:] * row_gradient[:, None]
    label_gradient = (torch.expm1(-losses) * row_gradient)[:, None]
    for start, stop, block in weight_blocks(weight, columns, compute):
        gradient = gradient_buffer[: stop - start].zero_()
        for first in range(0, len(hidden), chunk):
            part = slice(first, min(first + chunk, len(hidden)))
            logits = gemm.forward(states[part], block, None).to(dtype)
            weights = logits.sub_(shift[part]).exp_().mul_(scale[part])
            _put_label(weights, labels[part, None] - start, label_gradient[part])
            gradient.addmm_(weights.T, wide_states[part])
            del logits, weights
        result[start:stop] = gradient
    return result


def _products(weight: torch.Tensor) -> tuple[Gemm, torch.dtype]:
    """The Gemm that multiplies by blocks of weight, and the dtype it multiplies in."""
    if not weight.is_cpu:
        # torch's own products, which is what BLAS calls; in 16 bits they would round the logits
        return BLAS, accumulation_dtype(weight.dtype)
    dtype = product_dtype(weight.dtype)
    return fastest(dtype), dtype


def _accumulate(gemm: Gemm, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if right.dtype == total.dtype:
        gemm.add(total, left, right)
    else:
        total.add_(gemm.backward(left.to(right.dtype), right))


def _inside(logits: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inside = (column >= 0) & (column < logits.shape[1])
    return inside, torch.where(inside, column, 0)


def _take_label(logits: torch.Tensor, column: torch.Tensor, label_logit: torch.Tensor) -> None:
    """Move the label's logit, where this block has it, out of logits [R, C] into label_logit [R, 1]."""
    inside, column = _inside(logits, column)
    found = logits.gather(1, column)
    label_logit.copy_(torch.where(inside, found, label_logit))
    logits.scatter_(1, column, torch.where(inside, -torch.inf, found))


def _put_label(values: torch.Tensor, column: torch.Tensor, new: torch.Tensor) -> None:
    """Write new [R, 1] at the label's column of values [R, C], where this block has it."""
    inside, column = _inside(values, column)
    values.scatter_(1, column, torch.where(inside, new, values.gather(1, column)))
