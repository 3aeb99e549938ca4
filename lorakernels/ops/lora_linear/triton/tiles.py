"""Which GEMM serves which chip and which tensors: the families, their tiles, and one table of both."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Family(StrEnum):
    """How the product with the frozen weight and the update is made."""

    TMA = "tma"  # one persistent kernel, operands by the tensor memory accelerator
    POINTER = "pointer"  # one kernel, operands by pointers and masks
    VENDOR = "vendor"  # the vendor's GEMM, to which the update is added in place


@dataclass(frozen=True)
class Tile:
    """Block sizes, warps and pipeline stages of a GEMM kernel."""

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


# The vendor's GEMM has tiles of its own.
NO_TILE = Tile(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Gemm:
    """A family and its tile."""

    family: Family
    tile: Tile = NO_TILE

    def __str__(self) -> str:
        if self.family is Family.VENDOR:
            return str(self.family)
        return f"{self.family}-{self.tile}" if self.family is Family.TMA else str(self.tile)


@dataclass(frozen=True)
class Chip:
    """What the choice of a GEMM depends on.

    Attributes:
        major: of CUDA's compute capability, 0 for other GPUs.
        shared_limit: bytes of shared memory that one block may use.
    """

    major: int
    shared_limit: int


VENDOR = Gemm(Family.VENDOR)
TMA_TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4))
# Under a mask, registers must be left for it beside the sums.
MASKED_TMA_TILES = (Tile(128, 128, 64, 8, 4),)
# By bytes of an element; the last of each fits every chip.
POINTER_TILES = {
    2: (
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 256, 32, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 128, 32, 8, 4),
    ),
    4: (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
}
MASKED_TILES = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 8, 4)),
    4: (Tile(64, 64, 32, 4, 2),),
}
# Where rows are not aligned each element has an address of its own: these serve masked ones too.
UNALIGNED_TILES = {
    2: (Tile(64, 128, 64, 8, 3), Tile(64, 128, 32, 8, 4)),
    4: (Tile(64, 64, 32, 8, 2),),
}


def shipped_gemms(dtype: torch.dtype, chip: Chip, *, aligned: bool, masked: bool) -> tuple[Gemm, ...]:
    """What is offered for operands of dtype on a chip.

        chip              16 bits, aligned     others
        CUDA from 9.0 on  TMA, vendor          pointer, vendor
        others            pointer, vendor      pointer, vendor

    The first is taken where none is measured.

    aligned: rows of x, of weight, in the order in which it is stored, and of the result begin at multiples of
    `problem.ALIGNMENT` bytes. masked: the update is that of dx under dropout, which the vendor's GEMM cannot
    mask.
    """
    size = dtype.itemsize
    tiles: tuple[Tile, ...]
    if size == 2 and chip.major >= 9 and aligned:
        family, tiles = Family.TMA, MASKED_TMA_TILES if masked else TMA_TILES
    else:
        table = POINTER_TILES if aligned and not masked else MASKED_TILES if aligned else UNALIGNED_TILES
        family, tiles = Family.POINTER, table[size]
    fitting = tuple(Gemm(family, tile) for tile in tiles if tile.shared_bytes(size) <= chip.shared_limit)
    return fitting if masked else (*fitting, VENDOR)


def default_gemm(dtype: torch.dtype) -> Gemm:
    """The one where nothing was measured: its tile fits every chip and every tensor."""
    return Gemm(Family.POINTER, UNALIGNED_TILES[dtype.itemsize][-1])
