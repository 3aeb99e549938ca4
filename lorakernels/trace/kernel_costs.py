"""Bytes and FLOPs of one launch of a Triton kernel: what each kernel reads, writes and multiplies.

A program of a thin kernel handles a block of ranks: x or dy is read once for every such block. FLOPs count
the parts into which a float32 factor is split beside 16 bits. What is read again while it is in the cache,
such as the rows of a layer norm, is counted once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lorakernels.trace.record import Launch, described, footprint, is_wide


@dataclass(frozen=True)
class _Call:
    """A launch's arguments and constants by name, and its grid."""

    arguments: dict[str, Any]
    grid: tuple[int, int, int]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def bytes(self, *names: str) -> int:
        """Of the tensors with these names (without _ptr or _desc), together."""
        return sum(footprint(_tensor(self.arguments, name)) for name in names)

    def parts(self, name: str, rows: str, low: str) -> int:
        """Bytes of the parts of a factor that a thin kernel reads: high, and low where there is one."""
        columns = self["BLOCK_R"] * (2 if self[low] else 1)
        return self[rows] * columns * _tensor(self.arguments, name).element_size()

    def products(self, *sizes: int) -> int:
        """FLOPs of a product of these sizes with one block of ranks."""
        flops = 2 * self["BLOCK_R"]
        for size in sizes:
            flops *= size
        return flops


_Cost = tuple[int, int, int]  # bytes read, bytes written, FLOPs


def _tensor(arguments: dict[str, Any], name: str) -> Tensor:
    """The tensor, or what a descriptor describes, with that name (without _ptr or _desc)."""
    if f"{name}_ptr" in arguments:
        return arguments[f"{name}_ptr"]
    described_one = arguments[f"{name}_desc"]
    return torch.empty_strided(
        described_one.shape, described_one.strides, dtype=described_one.base.dtype, device="meta"
    )


def _pack(call: _Call) -> _Cost:
    # a factor that is not packed has no rows
    given = [name for name, rows in (("a", "K"), ("b", "N"), ("s", "M")) if call[rows]]
    return call.bytes(*given), call.bytes(*(f"{name}_parts" for name in given)), 0


def _shrink(call: _Call) -> _Cost:
    blocks = call.grid[1]
    read = blocks * (call.bytes("x") + call.parts("factor", "K", "LOW"))
    written = call.bytes("left") + (call.bytes("s") if call["WIDE"] else 0)
    return read, written, (2 if call["LOW"] else 1) * blocks * call.products(call["M"], call["K"])


def _reduce(call: _Call) -> _Cost:
    return call.bytes("partial"), call.bytes("out"), 0


def _product(call: _Call) -> _Cost:
    # without an update R is 0; its factors are in x's dtype
    update = (call["M"] + call["N"]) * call["R"] * _tensor(call.arguments, "x").element_size()
    read = call.bytes("x", "weight") + update + (call.bytes("bias") if call["BIAS"] else 0)
    # which the kernel with pointers does not have
    read += call.bytes("gelu_input") if call.arguments.get("GELU") else 0
    return read, call.bytes("y"), 2 * call["M"] * call["N"] * (call["K"] + call["R"])


def _one_pass(call: _Call) -> _Cost:
    parts = sum(2 if call[name] else 1 for name in ("B_LOW", "S_LOW"))
    read = call.bytes("dy") + call.parts("b", "N", "B_LOW") + call.parts("s", "M", "S_LOW")
    return read, call.bytes("ds_partial", "db_partial"), parts * call.products(call["M"], call["N"])


def _sum(call: _Call) -> _Cost:
    blocks = call.grid[2]
    read = blocks * (call.bytes("x") + call.parts("factor", "M", "LOW"))
    flops = (2 if call["LOW"] else 1) * blocks * call.products(call["M"], call["K"])
    return read, call.bytes("partial"), flops


def _layer_norm_shrink(call: _Call) -> _Cost:
    parts = 2 if call["SPLIT"] else 1
    read = call.bytes("x", "norm_weight", "norm_bias", "lora_a")
    return read, call.bytes("h", "s", "mean", "rstd"), parts * call.products(call["M"], call["K"])


def _add_layer_norm(call: _Call) -> _Cost:
    return call.bytes("x", "residual", "weight", "bias"), call.bytes("t", "h", "mean", "rstd"), 0


def _add_layer_norm_backward(call: _Call) -> _Cost:
    read = call.bytes("dh", "x", "weight", "mean", "rstd") + (call.bytes("dt") if call["ADD"] else 0)
    return read, call.bytes("dx"), 0


def _softmax(call: _Call) -> _Cost:
    # without counting rows whose maximum rises so far that they are scaled down
    read, written = call.bytes("logits", "labels"), call.bytes("losses", "statistics")
    return read, written + (call.bytes("logits") if call["WITH_GRADIENT"] else 0), 0


def _softmax_again(call: _Call) -> _Cost:
    logits = call.bytes("logits")
    return logits + call.bytes("labels", "statistics", "label_gradient", "row_gradient"), logits, 0


COSTS: dict[str, Callable[[_Call], _Cost]] = {
    "lora_linear_pack_kernel": _pack,
    "lora_linear_shrink_kernel": _shrink,
    "lora_linear_reduce_kernel": _reduce,
    "lora_linear_gemm_kernel": _product,
    "lora_linear_tma_kernel": _product,
    "lora_linear_backward_kernel": _one_pass,
    "lora_linear_sum_kernel": _sum,
    "layer_norm_shrink_kernel": _layer_norm_shrink,
    "add_layer_norm_forward_kernel": _add_layer_norm,
    "add_layer_norm_backward_kernel": _add_layer_norm_backward,
    "linear_cross_entropy_forward_kernel": _softmax,
    "linear_cross_entropy_backward_kernel": _softmax_again,
}


def launch_of(kernel: str, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Launch:
    """The launch of a kernel with these arguments and constants. Raises KeyError for an unknown kernel."""
    if kernel not in COSTS:
        raise KeyError(f"{kernel}: lorakernels/trace/kernel_costs.py does not say what it reads and writes")
    read, written, flops = COSTS[kernel](_Call(arguments, grid))
    names = [name for name, one in arguments.items() if isinstance(one, (Tensor, TensorDescriptor))]
    names = [name.removesuffix("_ptr").removesuffix("_desc") for name in names]
    tensors = {name: _tensor(arguments, name) for name in names}
    listed = ", ".join(f"{name} {described(one)}" for name, one in tensors.items())
    wide = is_wide(next(iter(tensors.values())).dtype)
    return Launch("triton", kernel, f"grid {list(grid)}, {listed}", read, written, flops, wide)
