"""The LoRA linear in Triton: the frozen GEMM adds the low-rank update in further iterations of its K loop.

Forward    shrink: S = s·drop(x)·Aᵀ; then one GEMM whose K loop runs over (x, W) and continues over (S, B).
Backward   one pass over dy gives dS = s·dy·B and the sums of dB = dyᵀ·S; the same GEMM runs over (dy, W) and
           continues over (dS, A) for dx; a last pass over x gives dA = dSᵀ·drop(x).

Sums that several programs share are written as partial sums and added by a second kernel in a fixed order: no
atomics, the same bits every time. Accumulation is in float32, as are S and dS. Beside a 16-bit x a float32
factor goes through the 16-bit units in parts: three, which are exact, in the thin products; high + low in the
GEMM, where high·high + low·high + high·low stand side by side in the padding of the rank, at no further
iteration for small ranks. What is rounded to 16 bits is the result alone, once.

Dropout is a function of (seed, row, column), `reference.keep_mask`, so that every kernel makes the mask that
the forward used again.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakernels.ops.lora_linear.kernels import (
    PACKED_LEFT,
    PACKED_RIGHT,
    UNPACKED,
    lora_linear_backward_a_kernel,
    lora_linear_backward_kernel,
    lora_linear_forward_kernel,
    lora_linear_reduce_kernel,
    lora_linear_shrink_kernel,
)
from lorakernels.ops.lora_linear.problem import Gradients, Needs, Problem


@dataclass(frozen=True)
class Tile:
    """Block sizes, warps and pipeline stages of the GEMM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.num_warps}s{self.num_stages}"

    def shared_bytes(self, element_size: int) -> int:
        """Shared memory that the operands of all stages take."""
        return (self.block_m + self.block_n) * self.block_k * self.num_stages * element_size


@dataclass(frozen=True)
class ThinTile:
    """Rows and columns of x or dy that a thin kernel reads at a time, warps and pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# The shipped tiles of the GEMM by element size; a chip gets those whose operands fit in its shared memory,
# and the last one fits all. With dropout, registers must be left for the mask beside the sums.
TILES = {
    2: (
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 32, 4, 4),
    ),
    4: (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
}
DROPOUT_TILES = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 8, 4)),
    4: (Tile(64, 64, 32, 4, 2),),
}
# Tiles of the thin kernels by element size.
SHRINK_TILES = {2: ThinTile(64, 64, 4, 3), 4: ThinTile(32, 32, 4, 3)}
BACKWARD_TILES = {2: ThinTile(128, 64, 8, 2), 4: ThinTile(64, 32, 8, 2)}
BACKWARD_A_TILES = {2: ThinTile(64, 128, 8, 2), 4: ThinTile(32, 64, 8, 2)}
REDUCE_ROWS = 64
# Programs that a thin kernel aims at by splitting its sum: a constant, so that all devices add in one order.
PROGRAMS = 256
# Ranks that a thin kernel handles at once: sums for 64 overflow the registers of sm_80 and gfx942.
RANK_BLOCK = 32


def shipped_tiles(dtype: torch.dtype, shared_limit: int, dropout: bool = False) -> tuple[Tile, ...]:
    """The GEMM tiles for operands of dtype that fit into shared_limit bytes of shared memory."""
    size = dtype.itemsize
    tiles = (DROPOUT_TILES if dropout else TILES)[size]
    return tuple(tile for tile in tiles if tile.shared_bytes(size) <= shared_limit)


def forward(problem: Problem, *, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in float32, scale included; M, N and K are not zero."""
    x, weight, lora_b, seed = _unit_columns(problem.x), problem.weight, problem.lora_b, problem.seed
    with torch.cuda.device_of(x):
        if problem.s is None:
            partial = _shrink(x, problem.lora_a, problem.dropout_p, seed)
            factor = problem.scale / (1 - problem.dropout_p)
        else:
            partial, factor = problem.s[None], 1.0
        s, left = _reduce_and_pack(partial, lora_b.shape[1], factor, x.dtype, _parts(x, lora_b))
        right = _pack(lora_b, x, rank_contiguous=weight.stride(1) == 1)
        return _product(x, weight, problem.bias, left, right, 0.0, seed, tile), s


def backward(problem: Problem, dy: Tensor, s: Tensor, needs: Needs, *, tile: Tile | None = None) -> Gradients:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    weight, lora_a, lora_b = problem.weight, problem.lora_a, problem.lora_b
    dropout_p, seed = problem.dropout_p, problem.seed
    need_x, need_a, need_b = needs
    dx = da = db = None
    dy, x, s = _unit_columns(dy), _unit_columns(problem.x), _unit_columns(s)
    rank = lora_a.shape[0]
    with torch.cuda.device_of(x):
        if need_b:
            partial_ds, partial_db = _one_pass(dy, lora_b, s)
            db = _reduce(partial_db, rank, 1.0, lora_b.dtype)
        elif need_x or need_a:
            partial_ds = _shrink(dy, lora_b.T, 0.0, seed)
        if need_x or need_a:
            factor = problem.scale / (1 - dropout_p)
            ds, left = _reduce_and_pack(partial_ds, rank, factor, x.dtype, _parts(x, lora_a))
        if need_x:
            right = _pack(lora_a.T, x, rank_contiguous=weight.stride(0) == 1)
            dx = _product(dy, weight.T, None, left, right, dropout_p, seed, tile)
        if need_a:
            partial_da = _sum_over_rows(x, ds, dropout_p, seed)
            da = _reduce(partial_da, rank, 1.0, lora_a.dtype, transposed=True).T
    return dx, da, db


def _shrink(x: Tensor, factor: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Partial sums [splits, M, padded rank] of drop(x)·factorᵀ, x [M, K], factor [r, K]."""
    (m, k), rank = x.shape, factor.shape[0]
    block_r, padded = _rank_blocks(rank)
    tile = SHRINK_TILES[x.element_size()]
    blocks = triton.cdiv(m, tile.rows) * (padded // block_r)
    splits, length = _split(k, tile.columns, blocks)
    partial = torch.empty(splits, m, padded, dtype=torch.float32, device=x.device)
    lora_linear_shrink_kernel[(triton.cdiv(m, tile.rows), splits, padded // block_r)](
        x, factor, partial, seed,
        m, k, rank, length,
        x.stride(0), factor.stride(0), factor.stride(1), partial.stride(0), partial.stride(1),
        dropout_p,
        BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=block_r, DROPOUT=dropout_p > 0,
        SPLIT=x.dtype != factor.dtype, SHIFT=_shift(x),
        PRECISION=precision(x), num_warps=_thin_warps(x, tile), num_stages=tile.num_stages,
    )  # fmt: skip
    return partial


def _one_pass(dy: Tensor, factor: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Partial sums of dy·factor [splits, M, padded rank] and of dyᵀ·s [M blocks, N, padded rank]."""
    (m, n), rank = dy.shape, factor.shape[1]
    block_r, padded = _rank_blocks(rank)
    tile = BACKWARD_TILES[dy.element_size()]
    blocks_m = triton.cdiv(m, tile.rows)
    splits, length = _split(n, tile.columns, blocks_m * (padded // block_r))
    ds = torch.empty(splits, m, padded, dtype=torch.float32, device=dy.device)
    db = torch.empty(blocks_m, n, padded, dtype=torch.float32, device=dy.device)
    lora_linear_backward_kernel[(blocks_m, splits, padded // block_r)](
        dy, factor, s, ds, db,
        m, n, rank, length,
        dy.stride(0), factor.stride(0), factor.stride(1), s.stride(0),
        ds.stride(0), ds.stride(1), db.stride(0), db.stride(1),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=block_r,
        SPLIT_FACTOR=dy.dtype != factor.dtype, SPLIT_S=dy.dtype != s.dtype, SHIFT=_shift(dy),
        PRECISION=precision(dy), num_warps=_thin_warps(dy, tile), num_stages=tile.num_stages,
    )  # fmt: skip
    return ds, db


def _sum_over_rows(x: Tensor, ds: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Partial sums [splits, K, padded rank] of drop(x)ᵀ·ds."""
    (m, k), rank = x.shape, ds.shape[1]
    block_r, padded = _rank_blocks(rank)
    tile = BACKWARD_A_TILES[x.element_size()]
    blocks = triton.cdiv(k, tile.columns) * (padded // block_r)
    splits, length = _split(m, tile.rows, blocks)
    partial = torch.empty(splits, k, padded, dtype=torch.float32, device=x.device)
    lora_linear_backward_a_kernel[(triton.cdiv(k, tile.columns), splits, padded // block_r)](
        x, ds, partial, seed,
        m, k, rank, length,
        x.stride(0), ds.stride(0), partial.stride(0), partial.stride(1),
        dropout_p,
        BLOCK_M=tile.rows, BLOCK_K=tile.columns, BLOCK_R=block_r, DROPOUT=dropout_p > 0,
        SPLIT=x.dtype != ds.dtype, SHIFT=_shift(x),
        PRECISION=precision(x), num_warps=_thin_warps(x, tile), num_stages=tile.num_stages,
    )  # fmt: skip
    return partial


def _reduce(partial: Tensor, rank: int, scale: float, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """scale·Σ partial as [rows, rank] in dtype, stored by columns where transposed."""
    rows = partial.shape[1]
    shape = (rank, rows) if transposed else (rows, rank)
    total = torch.empty(shape, dtype=dtype, device=partial.device)
    total = total.T if transposed else total
    _launch_reduce(partial, total, None, rank, scale, UNPACKED, 1)
    return total


def _reduce_and_pack(
    partial: Tensor, rank: int, scale: float, dtype: torch.dtype, parts: int
) -> tuple[Tensor, Tensor]:
    """scale·Σ partial as [rows, rank] in float32 and, in dtype, as the left factor of the GEMM."""
    rows, (_, padded) = partial.shape[1], _rank_blocks(rank)
    total = torch.empty(rows, rank, dtype=torch.float32, device=partial.device)
    packed = torch.empty(rows, parts * padded, dtype=dtype, device=partial.device)
    _launch_reduce(partial, total, packed, rank, scale, PACKED_LEFT, parts)
    return total, packed


def _pack(factor: Tensor, x: Tensor, rank_contiguous: bool) -> Tensor:
    """factor [rows, r] as the right factor of the GEMM on x, stored in the order in which the weight is."""
    rows, rank = factor.shape
    _, padded = _rank_blocks(rank)
    parts = _parts(x, factor)
    shape = (rows, parts * padded) if rank_contiguous else (parts * padded, rows)
    packed = torch.empty(shape, dtype=x.dtype, device=x.device)
    packed = packed if rank_contiguous else packed.T
    _launch_reduce(factor[None], None, packed, rank, 1.0, PACKED_RIGHT, parts)
    return packed


def _launch_reduce(
    partial: Tensor,
    wide: Tensor | None,
    packed: Tensor | None,
    rank: int,
    scale: float,
    layout: tl.constexpr,
    parts: int,
) -> None:
    count, rows = partial.shape[:2]
    block_r, padded = _rank_blocks(rank)
    # a pointer that the kernel's constants rule out still needs an argument
    wide_like, packed_like = (partial if t is None else t for t in (wide, packed))
    lora_linear_reduce_kernel[(triton.cdiv(rows, REDUCE_ROWS), padded // block_r)](
        partial, wide_like, packed_like,
        count, rows, rank, padded,
        *partial.stride(), *wide_like.stride()[-2:], *packed_like.stride()[-2:],
        scale,
        BLOCK_M=REDUCE_ROWS, BLOCK_R=block_r, WIDE=wide is not None, LAYOUT=layout.value, PARTS=parts,
        num_warps=4,
    )  # fmt: skip


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
    dropout_p: float,
    seed: Tensor,
    tile: Tile | None,
) -> Tensor:
    """x·weightᵀ + bias + drop'(left·rightᵀ), [M, N]."""
    (m, k), n = x.shape, weight.shape[0]
    tile = tile or default_tile(x.dtype)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    lora_linear_forward_kernel[grid](
        x, weight, x if bias is None else bias, left, right, y, seed,
        m, n, k, left.shape[1],
        x.stride(0), weight.stride(0), weight.stride(1),
        left.stride(0), right.stride(0), right.stride(1), y.stride(0),
        dropout_p,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=8,
        BIAS=bias is not None, DROPOUT=dropout_p > 0,
        PRECISION=precision(x), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


def default_tile(dtype: torch.dtype) -> Tile:
    """The tile where nothing was measured: the one that fits every chip."""
    return TILES[dtype.itemsize][-1]


def precision(x: Tensor) -> str:
    """How tl.dot treats float32 operands: as torch's own matrix products are told to."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and _target(x) == ("cuda", 32) else "ieee"


def _thin_warps(x: Tensor, tile: ThinTile) -> int:
    """Warps of a thin kernel: 256 threads at most, which is four of AMD's warps."""
    return min(tile.num_warps, 256 // _target(x)[1])


def _target(x: Tensor) -> tuple[str, int]:
    """Backend and lanes of a warp where x is; the interpreter has neither."""
    if x.device.type == "cpu":
        return "interpreter", 32
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size


def _parts(x: Tensor, factor: Tensor) -> int:
    """Parts of the GEMM's factors: beside 16 bits S is high + low, and so is a factor that is wider."""
    if x.dtype == torch.float32:
        return 1
    return 2 if factor.dtype == x.dtype else 3


def _shift(x: Tensor) -> float:
    """What the residues of a split factor are multiplied by: float16 has no exponents to spare."""
    return 2048.0 if x.dtype == torch.float16 else 1.0


def _rank_blocks(rank: int) -> tuple[int, int]:
    """Block of ranks that a program handles, a power of two from 16 on, and the rank padded to blocks."""
    block = min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))
    return block, triton.cdiv(rank, block) * block


def _split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts, and of what length, a sum over length is split, given the programs there are."""
    trips = triton.cdiv(length, block)
    part = triton.cdiv(trips, max(1, min(trips, PROGRAMS // programs))) * block
    return triton.cdiv(length, part), part


def _unit_columns(tensor: Tensor) -> Tensor:
    """tensor [M, K] itself where its columns are adjacent, else a contiguous copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
