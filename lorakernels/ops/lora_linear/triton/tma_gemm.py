"""The GEMM with the update on chips that have a tensor memory accelerator (CUDA from 9.0 on).

One persistent kernel: a program for each multiprocessor walks over the tiles, and the loop over tiles is one
with that over K, so that the next tile's operands are on their way while a result is stored. The update is
further trips of the K loop, which select another pair of descriptors. Without an update, and with GELU's
derivative as a factor, it is also the gradient of `frozen_linear`.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lorakernels.launching import launch
from lorakernels.ops.lora_linear.problem import ALIGNMENT
from lorakernels.ops.lora_linear.triton.dropout import dropout_keep
from lorakernels.ops.lora_linear.triton.order import GROUP_M, tile_origin
from lorakernels.ops.lora_linear.triton.parts import Parts
from lorakernels.ops.lora_linear.triton.target import multiprocessors
from lorakernels.ops.lora_linear.triton.tiles import Tile

# Descriptors that are kept: five for every product of a model, whose activations come back at few addresses.
DESCRIPTORS = 4096
# of GELU's tanh form (arXiv:1606.08415)
TWICE_SLOPE, CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi)), tl.constexpr(0.044715)


@triton.jit
def add_block(acc, p_desc, q_desc, row, col, k, BY_ROWS: tl.constexpr):
    """acc + p·qᵀ over the block of columns from k on; q is stored [N, K], or [K, N] where not BY_ROWS."""
    p = p_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
    q = q_desc.load([col, k]).T if BY_ROWS else q_desc.load([k, col])  # [BLOCK_K, BLOCK_N]
    return tl.dot(p, q, acc)


@triton.jit
def gelu_derivative(x):
    """gelu'(x) in float32, for gelu(x) = x·sigmoid(2·sqrt(2/π)·(x + 0.044715·x³)), which is the tanh form."""
    x = x.to(tl.float32)
    square = x * x
    sigmoid = 1.0 / (1.0 + tl.exp(-x * TWICE_SLOPE * (1.0 + square * CUBIC)))
    return sigmoid * (1.0 + x * TWICE_SLOPE * (1.0 - sigmoid) * (1.0 + 3.0 * (square * CUBIC)))


@triton.jit
def lora_linear_tma_kernel(
    # descriptors: x [M, K], weight [N, K] or [K, N], y [M, N];
    # left [M, R], right [N, R] or [R, N] or None; gelu_input [M, N] or None
    x_desc,
    weight_desc,
    y_desc,
    left_desc,
    right_desc,
    gelu_input_desc,
    # data: bias [N]
    bias_ptr,
    seed_ptr,
    # sizes
    M,
    N,
    K,
    R,
    dropout_p,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    UPDATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    GELU: tl.constexpr,
):
    """y = x·weightᵀ + bias + drop'(left·rightᵀ); serves dx too, as dy·W + drop'(dS·A).

    The update is left out without UPDATE. With GELU the sum is multiplied by gelu'(gelu_input).
    """
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    trips_k, trips_r = tl.cdiv(K, BLOCK_K), tl.cdiv(R, BLOCK_K)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, PROGRAMS, flatten=True):
        row, col = tile_origin(tile, blocks_m, blocks_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if DROPOUT:
            # the mask acts on the update alone, which therefore goes first
            for trip in range(trips_r):
                acc = add_block(acc, left_desc, right_desc, row, col, trip * BLOCK_K, BY_ROWS)
            rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
            keep = dropout_keep(seed_ptr, rows, col, dropout_p, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc, 0.0)
        if UPDATE and not DROPOUT:
            for trip in range(trips_k + trips_r):
                p_desc, q_desc, k = x_desc, weight_desc, trip * BLOCK_K
                if trip >= trips_k:
                    p_desc, q_desc, k = left_desc, right_desc, (trip - trips_k) * BLOCK_K
                acc = add_block(acc, p_desc, q_desc, row, col, k, BY_ROWS)
        else:
            for trip in range(trips_k):
                acc = add_block(acc, x_desc, weight_desc, row, col, trip * BLOCK_K, BY_ROWS)
        if BIAS:
            cols = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if GELU:
            # by halves: a whole tile of gelu_input beside the sums overflows registers and shared memory
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left_half, right_half = tl.split(halves)  # [BLOCK_M, BLOCK_N // 2] each
            left_half *= gelu_derivative(gelu_input_desc.load([row, col]))
            y_desc.store([row, col], left_half.to(y_desc.dtype))
            col += BLOCK_N // 2
            right_half *= gelu_derivative(gelu_input_desc.load([row, col]))
            y_desc.store([row, col], right_half.to(y_desc.dtype))
        else:
            y_desc.store([row, col], acc.to(y_desc.dtype))


def addressable(x: Tensor, weight: Tensor) -> bool:
    """Whether it can address x [M, K], weight [N, K] in its storage order, and rows of N results."""
    stored = weight if weight.stride(1) == 1 else weight.T
    return describable(x) and describable(stored) and not weight.shape[0] * x.element_size() % ALIGNMENT


def describable(tensor: Tensor) -> bool:
    """Whether a descriptor of tensor [rows, columns] is possible."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and not (row_bytes % ALIGNMENT or tensor.data_ptr() % ALIGNMENT)


def product(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    *,
    bias: Tensor | None = None,
    update: tuple[Parts, Parts] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    gelu_input: Tensor | None = None,
) -> Tensor:
    """(x·weightᵀ + bias + drop'(left·rightᵀ)) · gelu'(gelu_input), [M, N]; what is None is left out.

    x and weight are `addressable`, as y [M, N] is, and gelu_input [M, N] `describable`. update is left and
    right; seed is needed where dropout_p is not zero.
    """
    (m, k), n = x.shape, weight.shape[0]
    by_rows = weight.stride(1) == 1
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_x = (tile.block_m, tile.block_k)
    block_weight = (tile.block_n, tile.block_k) if by_rows else (tile.block_k, tile.block_n)
    # with GELU a tile is stored by halves
    block_y = (tile.block_m, tile.block_n if gelu_input is None else tile.block_n // 2)
    left_desc = right_desc = gelu_input_desc = None
    ranks = 0
    if update is not None:
        left, right = (one.values[:, : one.columns] for one in update)
        left_desc = descriptor(left, block_x)
        right_desc = descriptor(right if by_rows else right.T, block_weight)
        ranks = left.shape[1]
    if gelu_input is not None:
        gelu_input_desc = descriptor(gelu_input, block_y)
    programs = multiprocessors(x.device)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    launch(
        lora_linear_tma_kernel, (min(programs, tiles),),
        descriptor(x, block_x), descriptor(weight if by_rows else weight.T, block_weight),
        descriptor(y, block_y), left_desc, right_desc, gelu_input_desc,
        x if bias is None else bias, x if seed is None else seed,
        m, n, k, ranks,
        dropout_p,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, PROGRAMS=programs,
        BY_ROWS=by_rows, BIAS=bias is not None, UPDATE=update is not None, DROPOUT=dropout_p > 0,
        GELU=gelu_input is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


class _Address(NamedTuple):
    """A tensor's memory, as Triton's launcher asks for it, without keeping it alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of a tensor [rows, columns] for blocks of that size.

    It is made on the host: Triton checks it in Python, which takes longer than to look it up. Nothing else
    of a tensor enters it than what it is kept under.
    """
    if not tensor.is_cuda:
        return TensorDescriptor.from_tensor(tensor, list(block))
    return _kept_descriptor(
        tensor.device, _Address(tensor.data_ptr(), tensor.dtype), tuple(tensor.shape), tensor.stride(), block
    )


@functools.lru_cache(DESCRIPTORS)
def _kept_descriptor(
    device: torch.device,
    memory: _Address,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, int],
) -> TensorDescriptor:
    return TensorDescriptor(memory, list(shape), list(strides), list(block))
