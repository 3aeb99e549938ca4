"""The order of output tiles, which both GEMM kernels walk."""

import triton
import triton.language as tl

# Tiles of as many rows, one below the other, come before those of the next column.
GROUP_M = 8


@triton.jit
def tile_origin(
    tile, blocks_m, blocks_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """First row and column of a tile; in groups, so that those computed together share operands in L2."""
    group = tile // (GROUP_M * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * blocks_n)
    return (group * GROUP_M + within % group_rows) * BLOCK_M, (within // group_rows) * BLOCK_N
