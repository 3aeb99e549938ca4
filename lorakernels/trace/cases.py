"""The operators' cases, at the sizes of BLOOM-1b7's layers and 4 x 2048 tokens."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorakernels import (
    add_layer_norm,
    alibi_attention,
    alibi_slopes,
    attention_mask,
    frozen_linear,
    linear_cross_entropy,
    lora_linear,
)
from lorakernels.trace.record import Case, Trace

M, K, N, RANKS, SCALE = 8192, 2048, 6144, (8, 64), 4.0
INNER = 4 * K  # width between the two layers of the feed-forward part
BATCH, HEADS, LENGTH, WIDTH = 4, 16, 2048, 128
VOCABULARY = 250_880
DTYPE = torch.bfloat16

LOSS_READS = {"nonzero": len, "tolist": lambda _: [0, VOCABULARY - 1]}


def cases() -> Iterator[Case]:
    """The layers, the loss, attention and layer norms, by every implementation for CUDA; a frozen layer."""
    for rank in RANKS:
        yield Case(layer_name(rank), "frozen", _frozen)
        for backend in ("aten", "triton", "triton:vendor"):
            yield Case(layer_name(rank), f"lorakernels:{backend}", _layer(rank))
    down = f"frozen_linear after GELU M={M} K={INNER} N={K} bfloat16"
    for backend in ("aten", "triton"):
        yield Case(down, f"lorakernels:{backend}", _frozen_after_gelu)
    loss = f"linear_cross_entropy T={M} H={K} V={VOCABULARY} bfloat16"
    yield Case(loss, "lorakernels:triton", _loss, LOSS_READS)
    attention = f"alibi_attention B={BATCH} heads={HEADS} T={LENGTH} D={WIDTH} bfloat16"
    yield Case(attention, "lorakernels:triton", _attention)
    for backend in ("aten", "triton"):
        yield Case(f"add_layer_norm M={M} K={K} bfloat16", f"lorakernels:{backend}", _add_layer_norm)


def layer_name(rank: int) -> str:
    """The name of the layer's case."""
    return f"lora_linear M={M} K={K} N={N} r={rank} bfloat16"


def empty(*shape: int, dtype: torch.dtype = DTYPE, trained: bool = False) -> Tensor:
    """A tensor on the GPU."""
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=trained)


def forward_and_backward(trace: Trace, calculate: Callable[[], Tensor]) -> None:
    """Record calculate() as the forward pass and the gradients of all its inputs as the backward pass."""
    with trace.recording("forward"):
        result = calculate()
    gradient = torch.empty_like(result)
    with trace.recording("backward"):
        torch.autograd.backward(result, gradient)


def _layer(rank: int) -> Callable[[Trace], None]:
    def run(trace: Trace) -> None:
        x, weight, bias = empty(M, K, trained=True), empty(N, K), empty(N)
        lora_a = empty(rank, K, dtype=torch.float32, trained=True)
        lora_b = empty(N, rank, dtype=torch.float32, trained=True)
        forward_and_backward(trace, lambda: lora_linear(x, weight, bias, lora_a, lora_b, SCALE))

    return run


def _add_layer_norm(trace: Trace) -> None:
    x, residual = empty(M, K, trained=True), empty(M, K)
    with trace.recording("forward"):
        results = add_layer_norm(x, residual, empty(K), empty(K), 1e-5)
    gradients = [torch.empty_like(one) for one in results]
    with trace.recording("backward"):
        torch.autograd.backward(results, gradients)


def _frozen(trace: Trace) -> None:
    x, weight, bias = empty(M, K, trained=True), empty(N, K), empty(N)
    forward_and_backward(trace, lambda: frozen_linear(x, weight, bias))


def _frozen_after_gelu(trace: Trace) -> None:
    x, weight, bias = empty(M, INNER, trained=True), empty(K, INNER), empty(K)
    forward_and_backward(trace, lambda: frozen_linear(x, weight, bias, gelu=True))


def _loss(trace: Trace) -> None:
    hidden, weight = empty(M, K, trained=True), empty(VOCABULARY, K)
    labels = empty(M, dtype=torch.int64)
    forward_and_backward(trace, lambda: linear_cross_entropy(hidden, weight, labels))


def _attention(trace: Trace) -> None:
    # stored as a projection writes them
    parts = [empty(BATCH, LENGTH, HEADS, WIDTH, trained=True) for _ in range(3)]
    slopes = alibi_slopes(HEADS, device=parts[0].device)
    mask = attention_mask(None, BATCH, LENGTH, parts[0].device)

    def attend() -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in parts)
        return alibi_attention(query, key, value, slopes, mask=mask)

    forward_and_backward(trace, attend)
