"""The GEMM with the update on chips that have a tensor memory accelerator (CUDA from 9.0 on).

One persistent kernel: a program for each multiprocessor walks over the tiles, and the loop over tiles is one
with that over K, so that the next tile's operands are on their way while a result is stored. The update is
further trips of the K loop, which select another pair of descriptors.
"""

import functools
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


@triton.jit
def add_block(acc, p_desc, q_desc, row, col, k, BY_ROWS: tl.constexpr):
    """acc + p·qᵀ over the block of columns from k on; q is stored [N, K], or [K, N] where not BY_ROWS."""
    p = p_desc.load([row, k])  # [BLOCK_M, BLOCK_K]
    q = q_desc.load([col, k]).T if BY_ROWS else q_desc.load([k, col])  # [BLOCK_K, BLOCK_N]
    return tl.dot(p, q, acc)


@triton.jit
def lora_linear_tma_kernel(
    # descriptors: x [M, K], weight [N, K] or [K, N], left [M, R], right [N, R] or [R, N], y [M, N]
    x_desc,
    weight_desc,
    left_desc,
    right_desc,
    y_desc,
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
    DROPOUT: tl.constexpr,
):
    """y = x·weightᵀ + bias + drop'(left·rightᵀ); serves dx too, as dy·W + drop'(dS·A)."""
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
            for trip in range(trips_k):
                acc = add_block(acc, x_desc, weight_desc, row, col, trip * BLOCK_K, BY_ROWS)
        else:
            for trip in range(trips_k + trips_r):
                p_desc, q_desc, k = x_desc, weight_desc, trip * BLOCK_K
                if trip >= trips_k:
                    p_desc, q_desc, k = left_desc, right_desc, (trip - trips_k) * BLOCK_K
                acc = add_block(acc, p_desc, q_desc, row, col, k, BY_ROWS)
        if BIAS:
            cols = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, col], acc.to(y_desc.dtype))


def addressable(x: Tensor, weight: Tensor) -> bool:
    """Whether it can address x [M, K], weight [N, K] in its storage order, and rows of N results."""
    size, stored = x.element_size(), weight if weight.stride(1) == 1 else weight.T
    strides = x.stride(0), stored.stride(0), weight.shape[0]
    return (
        x.stride(1) == stored.stride(1) == 1
        and not any(stride * size % ALIGNMENT for stride in strides)
        and not (x.data_ptr() % ALIGNMENT or stored.data_ptr() % ALIGNMENT)
    )


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Parts,
    right: Parts,
    dropout_p: float,
    seed: Tensor,
    tile: Tile,
) -> Tensor:
    """x·weightᵀ + bias + drop'(left·rightᵀ), [M, N], of tensors that are `addressable`, as y [M, N] is."""
    (m, k), n = x.shape, weight.shape[0]
    by_rows = weight.stride(1) == 1
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    left_operand, right_operand = left.values[:, : left.columns], right.values[:, : right.columns]
    if not by_rows:
        weight, right_operand = weight.T, right_operand.T
    block_x, block_y = (tile.block_m, tile.block_k), (tile.block_m, tile.block_n)
    block_weight = (tile.block_n, tile.block_k) if by_rows else (tile.block_k, tile.block_n)
    programs = multiprocessors(x.device)
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    launch(
        lora_linear_tma_kernel, (min(programs, tiles),),
        descriptor(x, block_x), descriptor(weight, block_weight),
        descriptor(left_operand, block_x), descriptor(right_operand, block_weight), descriptor(y, block_y),
        x if bias is None else bias, seed,
        m, n, k, left.columns,
        dropout_p,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, PROGRAMS=programs,
        BY_ROWS=by_rows, BIAS=bias is not None, DROPOUT=dropout_p > 0,
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
