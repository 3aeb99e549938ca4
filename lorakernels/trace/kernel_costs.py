"""Bytes and FLOPs of one launch of a Triton kernel: what each kernel reads, writes and multiplies.

A program of a thin kernel handles a block of ranks: x or dy is read once for every such block, the third
dimension of the grid. FLOPs count the parts into which a float32 factor is split beside 16 bits. What a
program reads again while it is in the cache, the rows of a layer norm, is counted once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorakernels.trace.record import Launch, described, footprint, is_wide

PARTS = 3  # of a split factor
PARTS_OF_A = 2  # of A, where it is split beside a layer norm


@dataclass(frozen=True)
class _Call:
    """A launch's arguments and constants by name, and its grid."""

    arguments: dict[str, Any]
    grid: tuple[int, int, int]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def bytes(self, *names: str) -> int:
        """Of the tensors with these names (without _ptr), together."""
        return sum(footprint(self.arguments[f"{name}_ptr"]) for name in names)

    def products(self, *sizes: int) -> int:
        """FLOPs of a product of these sizes with one program's ranks, for all programs."""
        flops = 2 * self["BLOCK_R"] * self.grid[2]
        for size in sizes:
            flops *= size
        return flops


_Cost = tuple[int, int, int]  # bytes read, bytes written, FLOPs


def _shrink(call: _Call) -> _Cost:
    parts = PARTS if call["SPLIT"] else 1
    read = call.bytes("x") * call.grid[2] + call.bytes("factor")
    return read, call.bytes("partial"), parts * call.products(call["M"], call["K"])


def _reduce(call: _Call) -> _Cost:
    written = call.bytes("wide") if call["WIDE"] else 0
    # 0: nothing is packed
    written += call.bytes("packed") if call["LAYOUT"] else 0
    return call.bytes("partial"), written, 0


def _product(call: _Call) -> _Cost:
    read = call.bytes("x", "weight", "left", "right") + (call.bytes("bias") if call["BIAS"] else 0)
    return read, call.bytes("y"), 2 * call["M"] * call["N"] * (call["K"] + call["R"])


def _one_pass(call: _Call) -> _Cost:
    parts = sum(PARTS if call[name] else 1 for name in ("SPLIT_FACTOR", "SPLIT_S"))
    read = call.bytes("dy") * call.grid[2] + call.bytes("factor", "s")
    return read, call.bytes("ds_partial", "db_partial"), parts * call.products(call["M"], call["N"])


def _sum_over_rows(call: _Call) -> _Cost:
    parts = PARTS if call["SPLIT"] else 1
    read = call.bytes("x") * call.grid[2] + call.bytes("ds")
    return read, call.bytes("partial"), parts * call.products(call["M"], call["K"])


def _layer_norm_shrink(call: _Call) -> _Cost:
    parts = PARTS_OF_A if call["SPLIT"] else 1
    read = call.bytes("x", "norm_weight", "norm_bias", "lora_a")
    return read, call.bytes("h", "s", "mean", "rstd"), parts * call.products(call["M"], call["K"])


def _softmax(call: _Call) -> _Cost:
    # the gradient takes a second reading
    logits, again = call.bytes("logits"), int(call["WITH_GRADIENT"])
    written = again * logits + call.bytes("losses", "statistics")
    return logits * (1 + again) + call.bytes("labels"), written, 0


def _softmax_again(call: _Call) -> _Cost:
    logits = call.bytes("logits")
    return logits + call.bytes("labels", "statistics", "label_gradient", "row_gradient"), logits, 0


COSTS: dict[str, Callable[[_Call], _Cost]] = {
    "lora_linear_shrink_kernel": _shrink,
    "lora_linear_reduce_kernel": _reduce,
    "lora_linear_forward_kernel": _product,
    "lora_linear_backward_kernel": _one_pass,
    "lora_linear_backward_a_kernel": _sum_over_rows,
    "layer_norm_shrink_kernel": _layer_norm_shrink,
    "linear_cross_entropy_forward_kernel": _softmax,
    "linear_cross_entropy_backward_kernel": _softmax_again,
}


def launch_of(kernel: str, arguments: dict[str, Any], grid: tuple[int, int, int]) -> Launch:
    """The launch of a kernel with these arguments and constants. Raises KeyError for an unknown kernel."""
    if kernel not in COSTS:
        raise KeyError(f"{kernel}: lorakernels/trace/kernel_costs.py does not say what it reads and writes")
    read, written, flops = COSTS[kernel](_Call(arguments, grid))
    tensors = {name: one for name, one in arguments.items() if isinstance(one, Tensor)}
    listed = ", ".join(f"{name.removesuffix('_ptr')} {described(one)}" for name, one in tensors.items())
    wide = is_wide(next(iter(tensors.values())).dtype)
    return Launch("triton", kernel, f"grid {list(grid)}, {listed}", read, written, flops, wide)
