"""What is compiled: every launch that the operators make for a chip, traced on tensors without data.

The public functions run forward and backward with every shipped tile, so that arguments, constants and
options are those of a real call, and Triton derives the specialisation (divisibility by 16, strides of 1,
alignment) from them as it does at a launch.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakernels import (
    add_layer_norm,
    frozen_linear,
    layer_norm_shrink,
    linear_cross_entropy,
    linear_cross_entropy_in_blocks,
    lora_linear,
)
from lorakernels.aot.chips import Chip
from lorakernels.ops.lora_linear.implementations import is_aligned
from lorakernels.ops.lora_linear.triton.tiles import Family, shipped_gemms
from lorakernels.trace.calls import KernelCall
from lorakernels.trace.cases import forward_and_backward
from lorakernels.trace.pretend import trace_case
from lorakernels.trace.record import Case, Trace

# dtype of x and weight, dtype of the adapters
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
}
RANKS = (8, 16, 64)
DROPOUT = 0.1
# by what is added to the names of roles: M, N and K of the layer
RAGGED, ODD = ", ragged", ", odd widths"
SIZES = {"": (8192, 6144, 2048), RAGGED: (8191, 6144, 2048), ODD: (8191, 6141, 2047)}
# and rows, width and vocabulary of the loss
LOSS_SIZES = {"": (8192, 1024, 250_880), RAGGED: (8191, 1024, 250_881)}

GEMMS = ("lora_linear_tma_kernel", "lora_linear_gemm_kernel")
_ROLES = {
    "lora_linear_pack_kernel": "pack",
    "lora_linear_shrink_kernel": "shrink",
    "lora_linear_reduce_kernel": "reduce",
    "lora_linear_backward_kernel": "adapter_grad dS dB",
    "lora_linear_sum_kernel": "adapter_grad over rows",
    "layer_norm_shrink_kernel": "layer norm and shrink",
    "add_layer_norm_forward_kernel": "addition and layer norm",
    "add_layer_norm_backward_kernel": "layer norm gradient",
    "linear_cross_entropy_forward_kernel": "cross entropy forward",
    "linear_cross_entropy_backward_kernel": "cross entropy weight gradient",
}


@dataclass(frozen=True)
class Launch:
    """A call of a kernel.

    Attributes:
        role: what it is for.
        tile: how it is cut.
    """

    role: str
    tile: str
    call: KernelCall


@dataclass(frozen=True)
class _Layer:
    """One LoRA linear of a dtype (a key of DTYPES) and sizes M, N and K."""

    dtype: str
    sizes: tuple[int, int, int]
    rank: int
    dropout_p: float
    by_columns: bool

    def __call__(self, trace: Trace) -> None:
        (m, n, k), (dtype, adapter_dtype) = self.sizes, DTYPES[self.dtype]
        x, bias = _empty(dtype, m, k, trained=True), _empty(dtype, n)
        weight = _empty(dtype, k, n).T if self.by_columns else _empty(dtype, n, k)
        lora_a = _empty(adapter_dtype, self.rank, k, trained=True)
        lora_b = _empty(adapter_dtype, n, self.rank, trained=True)
        forward_and_backward(
            trace, lambda: lora_linear(x, weight, bias, lora_a, lora_b, 2.0, dropout_p=self.dropout_p)
        )


@dataclass(frozen=True)
class _Norm:
    """A layer norm with the shrink after it, of a dtype (a key of DTYPES) and sizes M, N and K."""

    dtype: str
    sizes: tuple[int, int, int]
    rank: int
    dropout_p: float

    def __call__(self, trace: Trace) -> None:
        (m, _, k), (dtype, adapter_dtype) = self.sizes, DTYPES[self.dtype]
        x, lora_a = _empty(dtype, m, k), _empty(adapter_dtype, self.rank, k)
        norm_weight, norm_bias = _empty(dtype, k), _empty(dtype, k)
        with trace.recording("forward"):
            layer_norm_shrink(x, norm_weight, norm_bias, 1e-5, lora_a, 2.0, dropout_p=self.dropout_p)


@dataclass(frozen=True)
class _Sum:
    """A residual addition with the layer norm of the sum, of a dtype (a key of DTYPES) and sizes M and K.

    adds: whether the gradient of the sum is added to that of the layer norm.
    """

    dtype: str
    sizes: tuple[int, int]
    adds: bool

    def __call__(self, trace: Trace) -> None:
        (m, k), dtype = self.sizes, DTYPES[self.dtype][0]
        x, residual = _empty(dtype, m, k, trained=True), _empty(dtype, m, k)
        with trace.recording("forward"):
            t, h = add_layer_norm(x, residual, _empty(dtype, k), _empty(dtype, k), 1e-5)
        results = [t, h] if self.adds else [h]
        gradients = [torch.empty_like(one) for one in results]
        with trace.recording("backward"):
            torch.autograd.backward(results, gradients)


@dataclass(frozen=True)
class _AfterGelu:
    """A frozen linear layer after GELU, of a dtype (a key of DTYPES) and sizes M, N and K."""

    dtype: str
    sizes: tuple[int, int, int]
    by_columns: bool

    def __call__(self, trace: Trace) -> None:
        (m, n, k), dtype = self.sizes, DTYPES[self.dtype][0]
        x, bias = _empty(dtype, m, k, trained=True), _empty(dtype, n)
        weight = _empty(dtype, k, n).T if self.by_columns else _empty(dtype, n, k)
        forward_and_backward(trace, lambda: frozen_linear(x, weight, bias, gelu=True))


@dataclass(frozen=True)
class _Loss:
    """The cross entropy of a trained head, or of one in blocks; trained: whether hidden is, too."""

    dtype: str
    sizes: tuple[int, int, int]
    trained: bool
    in_blocks: bool

    def __call__(self, trace: Trace) -> None:
        (rows, width, vocabulary), dtype = self.sizes, DTYPES[self.dtype][0]
        hidden = _empty(dtype, rows, width, trained=self.trained)
        weight = _empty(dtype, vocabulary, width, trained=True)
        labels = _empty(torch.int64, rows)
        if not self.in_blocks:
            forward_and_backward(trace, lambda: linear_cross_entropy(hidden, weight, labels))
            return
        with trace.recording("forward"):
            linear_cross_entropy_in_blocks(hidden, weight.detach().chunk(2), labels)


def launches(chip: Chip, dtype: str, *, everything: bool = True) -> list[Launch]:
    """Every distinct launch for that chip and dtype (a key of DTYPES).

    Without everything: of weights by rows and even widths. With dropout or ragged rows the largest rank of
    either way to dS and dB, and of ragged rows the largest tile, stand for all: they are the first to spill.
    """
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        launches = [
            *_layers(chip, dtype, everything),
            *_norms(chip, dtype, everything),
            *_sums(chip, dtype, everything),
            *_after_gelu(chip, dtype, everything),
            *_losses(chip, dtype),
        ]
        return list(dict.fromkeys(launches))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _layers(chip: Chip, dtype: str, everything: bool) -> Iterator[Launch]:
    for shape, by_columns, dropout_p in itertools.product(SIZES, (False, True), (0.0, DROPOUT)):
        operands, (_, n, k) = DTYPES[dtype][0], SIZES[shape]
        gemms = shipped_gemms(operands, chip.traits, aligned=is_aligned(operands, n, k), masked=dropout_p > 0)
        for gemm, rank in itertools.product(gemms, RANKS):
            rare = by_columns or shape == ODD or (shape == RAGGED and gemm != gemms[0])
            rare |= rank == RANKS[0] and (shape == RAGGED or dropout_p > 0)
            if rare and not everything:
                continue
            layer = _Layer(dtype, SIZES[shape], rank, dropout_p, by_columns)
            for direction, call in _calls(chip, f"triton:{gemm}", layer):
                role = _role(call, direction, by_columns) + shape
                yield Launch(role, str(gemm) if call.name in GEMMS else f"rank {rank}", call)


def _role(call: KernelCall, direction: str, by_columns: bool) -> str:
    """What the layer calls a kernel for."""
    arguments = dict(call.arguments)
    role = _ROLES.get(call.name) or ("forward" if direction == "forward" else "dx")
    if call.name == "lora_linear_reduce_kernel" and arguments["PACKED"]:
        role = "reduce and pack"
    if arguments.get("GELU"):
        role += " through GELU"
    if arguments.get("DROPOUT"):
        role += " with dropout"
    # the others do not see the weight
    return f"{role}, weight by columns" if by_columns and (call.name in GEMMS or role == "pack") else role


def _norms(chip: Chip, dtype: str, everything: bool) -> Iterator[Launch]:
    for shape, dropout_p, rank in itertools.product(SIZES, (0.0, DROPOUT), RANKS):
        rare = shape == ODD or (rank == RANKS[0] and (shape == RAGGED or dropout_p > 0))
        if rare and not everything:
            continue
        for direction, call in _calls(chip, "triton", _Norm(dtype, SIZES[shape], rank, dropout_p)):
            yield Launch(_role(call, direction, False) + shape, f"rank {rank}", call)


def _sums(chip: Chip, dtype: str, everything: bool) -> Iterator[Launch]:
    for shape, adds in itertools.product(SIZES, (True, False)):
        if (shape == ODD or not adds) and not everything:
            continue
        m, _, k = SIZES[shape]
        for _, call in _calls(chip, "triton", _Sum(dtype, (m, k), adds)):
            alone = not dict(call.arguments).get("ADD", True)
            yield Launch(f"{_ROLES[call.name]}{' alone' if alone else ''}{shape}", "row", call)


def _after_gelu(chip: Chip, dtype: str, everything: bool) -> Iterator[Launch]:
    operands = DTYPES[dtype][0]
    # where the product is not by TMA the layer launches no kernel of ours
    offered = shipped_gemms(operands, chip.traits, aligned=True, masked=False)
    tma = [gemm for gemm in offered if gemm.family is Family.TMA]
    for gemm, shape, by_columns in itertools.product(tma, ("", RAGGED), (False, True)):
        if (by_columns or (shape == RAGGED and gemm != tma[0])) and not everything:
            continue
        for direction, call in _calls(chip, f"triton:{gemm}", _AfterGelu(dtype, SIZES[shape], by_columns)):
            yield Launch(_role(call, direction, by_columns) + shape, str(gemm), call)


def _losses(chip: Chip, dtype: str) -> Iterator[Launch]:
    for shape, trained, in_blocks in itertools.product(LOSS_SIZES, (True, False), (False, True)):
        # of the kernel for a block, what takes the most registers
        if in_blocks and (shape != RAGGED or not trained):
            continue
        for _, call in _calls(chip, "", _Loss(dtype, LOSS_SIZES[shape], trained, in_blocks)):
            part = " of a block" if in_blocks else ""
            gradient = dict(call.arguments).get("WITH_GRADIENT", True)
            role = f"{_ROLES[call.name]}{part}{'' if gradient else ' without gradient'}{shape}"
            yield Launch(role, "row", call)


def _calls(chip: Chip, backend: str, run: Callable[[Trace], None]) -> Iterator[tuple[str, KernelCall]]:
    """The passes and kernel calls of run on that chip, in order."""
    reads = {"nonzero": len, "tolist": lambda _: [0, 1]}
    trace = trace_case(Case("compiled", f"lorakernels:{backend}", run, reads), chip)
    for name, counts in trace.passes.items():
        for launch in counts.launches:
            if launch.call is not None:
                yield name, launch.call


def _empty(dtype: torch.dtype, *shape: int, trained: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=trained)
