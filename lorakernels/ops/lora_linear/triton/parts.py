"""Factors of the update as parts in x's dtype, and the two kernels that make them.

Beside a 16-bit x a float32 factor is high + low, right to 2^-17 of itself. The GEMM multiplies left·rightᵀ,
in which the parts stand side by side, each padded with zeros to `width` ranks:

    left = [high | low | high]        right = [high | high | low]

That is the product of the two factors without low·low. A factor in x's own dtype has no low part: S and dS,
which are float32, then stand as [high | low] beside [high | high]. With a float32 x there is one part.

The thin products read high and low of either. float16 has no exponents to spare for the residues of small
factors: for them low follows once more, multiplied by 2048.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.launching import launch

LEFT, RIGHT = tl.constexpr(0), tl.constexpr(1)
# Ranks that a thin kernel handles at once: tl.dot wants 16, and more than 64 overflow the registers.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64
# Rows of a factor, or of partial sums, that a program handles.
PACK_ROWS, REDUCE_ROWS = 64, 16
FLOAT16_SHIFT = 2048.0


@dataclass(slots=True, eq=False)
class Parts:
    """A factor [rows, r] in parts.

    Attributes:
        values: [rows, at least columns] in x's dtype.
        columns: those that the GEMM multiplies.
        low: first column of the low part for the thin products; 0 where high is exact.
    """

    values: Tensor
    columns: int
    low: int


@dataclass(frozen=True)
class Layout:
    """How the factors of one problem are cut: from x's dtype, the adapters' and the rank.

    Attributes:
        dtype: of the parts.
        parts: side by side in the GEMM.
        rank: r.
        block: ranks that a thin kernel handles at once.
        width: columns of one part, a multiple of block.
        shift: what the low part for the thin products is multiplied by.
    """

    dtype: torch.dtype
    parts: int
    rank: int
    block: int
    width: int
    shift: float

    @classmethod
    def of(cls, x: Tensor, lora_a: Tensor) -> "Layout":
        """That of a problem with these tensors; lora_a is [r, K]."""
        rank = lora_a.shape[0]
        block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(rank)))
        parts = 1 if x.dtype == torch.float32 else 2 if lora_a.dtype == x.dtype else 3
        shift = FLOAT16_SHIFT if x.dtype == torch.float16 else 1.0
        return cls(x.dtype, parts, rank, block, triton.cdiv(rank, block) * block, shift)

    @property
    def partial_ranks(self) -> int:
        """Ranks of partial sums, padded so that rows are aligned to 32 bytes."""
        return triton.cdiv(self.rank, 8) * 8

    def left(self, rows: int, like: Tensor, parts: int) -> Parts:
        """The first `parts` of S or dS [rows, r], to be filled."""
        shifted = self.shift != 1.0
        low = 0 if self.parts == 1 else parts * self.width if shifted else self.width
        values = torch.empty(rows, (parts + shifted) * self.width, dtype=self.dtype, device=like.device)
        return Parts(values, parts * self.width, low)

    def right(self, rows: int, like: Tensor, by_columns: bool) -> Parts:
        """Parts of A or B, [rows, r], to be filled; by_columns: the rows are adjacent in memory."""
        exact = self.parts < 3
        shifted = self.shift != 1.0 and not exact
        columns = (self.parts + shifted) * self.width
        shape = (columns, rows) if by_columns else (rows, columns)
        values = torch.empty(shape, dtype=self.dtype, device=like.device)
        low = 0 if exact else (3 if shifted else 2) * self.width
        values = values.T if by_columns else values
        return Parts(values, self.parts * self.width, low)


@triton.jit
def split_factor(factor, dtype: tl.constexpr, SHIFT: tl.constexpr):
    """A float32 factor as high + low / SHIFT, both in dtype."""
    high = factor.to(dtype)
    return high, ((factor - high.to(tl.float32)) * SHIFT).to(dtype)


@triton.jit
def store_parts(
    out_ptr, value, mask, part_stride, LAYOUT: tl.constexpr, PARTS: tl.constexpr, SHIFT: tl.constexpr
):
    """The parts of a float32 value at out_ptr and every part_stride from there; SHIFT 1: none is shifted."""
    high, low = split_factor(value, out_ptr.dtype.element_ty, 1.0)
    stride = tl.cast(part_stride, tl.int64)
    tl.store(out_ptr, high, mask=mask)
    if PARTS > 1:
        second = low if LAYOUT == LEFT else high
        tl.store(out_ptr + stride, second, mask=mask)
    if PARTS > 2:
        third = high if LAYOUT == LEFT else low
        tl.store(out_ptr + 2 * stride, third, mask=mask)
    if SHIFT != 1.0:
        _, shifted = split_factor(value, out_ptr.dtype.element_ty, SHIFT)
        tl.store(out_ptr + PARTS * stride, shifted, mask=mask)


@triton.jit
def pack_rows(
    block,
    factor_ptr,
    out_ptr,
    n_rows,
    rank,
    stride_fm,
    stride_fr,
    stride_om,
    stride_or,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One block of rows and ranks of a factor [n_rows, rank] into its parts."""
    rows = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = (rows < n_rows)[:, None]
    value = tl.load(
        factor_ptr + rows[:, None] * stride_fm + ranks[None, :].to(tl.int64) * stride_fr,
        mask=row_ok & (ranks < rank)[None, :],
        other=0.0,
    ).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    at = out_ptr + rows[:, None] * stride_om + ranks[None, :].to(tl.int64) * stride_or
    store_parts(at, value, row_ok, WIDTH * stride_or, LAYOUT, PARTS, SHIFT)


@triton.jit
def lora_linear_pack_kernel(
    # data: a [K, r], b [N, r], s [M, r] and their parts
    a_ptr,
    a_parts_ptr,
    b_ptr,
    b_parts_ptr,
    s_ptr,
    s_parts_ptr,
    # sizes
    K,
    N,
    M,
    rank,
    # strides
    stride_ak,
    stride_ar,
    stride_apk,
    stride_apr,
    stride_bn,
    stride_br,
    stride_bpn,
    stride_bpr,
    stride_sm,
    stride_spm,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    S_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
    S_SHIFT: tl.constexpr,
):
    """A and B as right factors and S as a left one in one launch: each alone is too small for the device."""
    block = tl.program_id(0)
    blocks_a, blocks_b = tl.cdiv(K, BLOCK_M), tl.cdiv(N, BLOCK_M)
    if block < blocks_a:
        pack_rows(
            block, a_ptr, a_parts_ptr, K, rank, stride_ak, stride_ar, stride_apk, stride_apr,
            BLOCK_M, BLOCK_R, WIDTH, RIGHT, PARTS, SHIFT,
        )  # fmt: skip
    elif block < blocks_a + blocks_b:
        pack_rows(
            block - blocks_a, b_ptr, b_parts_ptr, N, rank, stride_bn, stride_br, stride_bpn, stride_bpr,
            BLOCK_M, BLOCK_R, WIDTH, RIGHT, PARTS, SHIFT,
        )  # fmt: skip
    else:
        pack_rows(
            block - blocks_a - blocks_b, s_ptr, s_parts_ptr, M, rank, stride_sm, 1, stride_spm, 1,
            BLOCK_M, BLOCK_R, WIDTH, LEFT, S_PARTS, S_SHIFT,
        )  # fmt: skip


@triton.jit
def lora_linear_reduce_kernel(
    # data: partial [count, rows, RANKS], out [rows, rank] or the parts of a left factor
    partial_ptr,
    out_ptr,
    # sizes
    count,
    n_rows,
    rank,
    # strides
    stride_om,
    stride_or,
    scale,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """scale·Σ partial, added in order, as it is or in parts."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = (rows < n_rows)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for index in range(count):
        at = partial_ptr + (tl.cast(index, tl.int64) * n_rows + rows[:, None]) * RANKS + ranks[None, :]
        total += tl.load(at, mask=row_ok & (ranks < rank)[None, :], other=0.0)
    total *= scale
    out_ptr += rows[:, None] * stride_om + ranks[None, :].to(tl.int64) * stride_or
    if PACKED:
        store_parts(out_ptr, total, row_ok, WIDTH * stride_or, LEFT, PARTS, SHIFT)
    else:
        tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=row_ok & (ranks < rank)[None, :])


def pack(
    layout: Layout,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    s: Tensor | None,
    *,
    whole_s: bool = False,
) -> tuple[Parts, Parts, Parts]:
    """Parts of A [r, K] as dx's right factor, of B [N, r] as y's, and of S [M, r].

    For one that is None there are none. The right factors are stored in the order in which the GEMM reads
    weight [N, K]. whole_s: S is y's left factor; else it has the parts for the thin products alone.
    """
    rows_adjacent = weight.stride(1) == 1
    s_count = layout.parts if whole_s else min(2, layout.parts)
    # what is not packed has no rows; its pointers still need arguments
    nothing = weight, Parts(weight, 0, 0)
    a = b = third = nothing
    if lora_a is not None:
        a = lora_a.T, layout.right(lora_a.shape[1], weight, by_columns=rows_adjacent)
    if lora_b is not None:
        b = lora_b, layout.right(len(lora_b), weight, by_columns=not rows_adjacent)
    if s is not None:
        third = s, layout.left(len(s), s, s_count)
    sizes = [0 if one is nothing else len(one[0]) for one in (a, b, third)]
    blocks = sum(triton.cdiv(size, PACK_ROWS) for size in sizes)
    launch(
        lora_linear_pack_kernel, (blocks, layout.width // layout.block),
        a[0], a[1].values, b[0], b[1].values, third[0], third[1].values,
        *sizes, layout.rank,
        *a[0].stride(), *a[1].values.stride(), *b[0].stride(), *b[1].values.stride(),
        third[0].stride(0), third[1].values.stride(0),
        BLOCK_M=PACK_ROWS, BLOCK_R=layout.block, WIDTH=layout.width,
        PARTS=layout.parts, S_PARTS=s_count,
        SHIFT=layout.shift if layout.parts == 3 else 1.0, S_SHIFT=layout.shift,
        num_warps=4,
    )  # fmt: skip
    return a[1], b[1], third[1]


def reduce(layout: Layout, partial: Tensor, dtype: torch.dtype, by_columns: bool = False) -> Tensor:
    """The sum of partial [count, rows, ranks] as [rows, r] in dtype."""
    rows = partial.shape[1]
    shape = (layout.rank, rows) if by_columns else (rows, layout.rank)
    out = torch.empty(shape, dtype=dtype, device=partial.device)
    out = out.T if by_columns else out
    _launch_reduce(layout, partial, out, 1.0, packed=False)
    return out


def reduce_to_parts(layout: Layout, partial: Tensor, scale: float) -> Parts:
    """scale times the sum of partial [count, rows, ranks], as a left factor."""
    left = layout.left(partial.shape[1], partial, layout.parts)
    _launch_reduce(layout, partial, left.values, scale, packed=True)
    return left


def _launch_reduce(layout: Layout, partial: Tensor, out: Tensor, scale: float, packed: bool) -> None:
    count, rows, ranks = partial.shape
    launch(
        lora_linear_reduce_kernel, (triton.cdiv(rows, REDUCE_ROWS), layout.width // layout.block),
        partial, out,
        count, rows, layout.rank,
        *out.stride(),
        scale,
        BLOCK_M=REDUCE_ROWS, BLOCK_R=layout.block, RANKS=ranks, WIDTH=layout.width,
        PACKED=packed, PARTS=layout.parts, SHIFT=layout.shift,
        num_warps=4,
    )  # fmt: skip
