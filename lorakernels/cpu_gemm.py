"""Matrix products with frozen weights on a CPU, by the library and in the precision that are faster here.

float32 has two libraries: the BLAS that torch multiplies with (MKL as a rule) and oneDNN, which torch itself
uses for 16 bits and compiled graphs. Which one is faster differs between makers of CPUs. And a CPU without
matrix units for bfloat16 multiplies float32 about twice as fast: casting a block of a 16-bit weight into a
reused buffer costs far less than the difference. Both choices are measured once for each thread count, by
`dispatch`. All accumulate in float32.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.tolerance import deviations

__all__ = [
    "BLAS",
    "NARROW",
    "ONEDNN",
    "Gemm",
    "fastest",
    "has_onednn",
    "in_float32",
    "precision_problem",
    "product_dtype",
    "weight_blocks",
    "widens",
]

BLOCK_BYTES = 16 * 2**20
PROBE_ROWS, PROBE_SIZE = 512, 1024
# float32 is the more precise, so a 16-bit product must win by more than the noise of a busy machine
ADVANTAGE = 1.5


@dataclass(frozen=True)
class Gemm(Implementation):
    """One way to multiply on a CPU, with no autograd.

    forward(x [M, K], weight [N, K], bias [N] or None) is ``x @ weight.T + bias``; backward(dy [M, N], weight)
    is ``dy @ weight``, the gradient of x; add(total [M, K], dy, weight) adds that to total in place.
    """

    add: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]


def fastest(dtype: torch.dtype) -> Gemm:
    """The `Gemm` for CPU weights of this dtype: a measurement, then remembered.

    Of 16-bit weights it is one in 16 bits only where that is `ADVANTAGE` times as fast as float32.
    """
    if dtype == torch.float32:
        ways = (BLAS, ONEDNN) if has_onednn() else (BLAS,)
        return dispatch.choose(precision_problem(dtype), ways, functools.partial(_Trial, dtype))
    if dtype not in (torch.float16, torch.bfloat16):
        return BLAS
    # first, since one measurement must not begin inside another
    wide = in_float32(fastest(torch.float32))
    trial = functools.partial(_Trial, dtype)
    return dispatch.choose(precision_problem(dtype), (wide, NARROW), trial, 1 / ADVANTAGE)


def widens(dtype: torch.dtype) -> bool:
    """Whether products with CPU weights of this dtype are made in a wider one."""
    return dtype in (torch.float16, torch.bfloat16) and fastest(dtype) is not NARROW


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which CPU tensors of this one are multiplied here."""
    return torch.float32 if widens(dtype) else dtype


@functools.cache
def has_onednn() -> bool:
    """Whether torch was built with the oneDNN operator that `ONEDNN` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def precision_problem(dtype: torch.dtype) -> str:
    """What `dispatch` remembers the choice for dtype under."""
    device = dispatch.device_name(torch.device("cpu"))
    return f"frozen products on {device}, {dispatch.dtype_name(dtype)} weights"


def weight_blocks(
    weight: torch.Tensor, rows: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield ``(start, stop, block)`` for each group of `rows` rows of weight [N, K], cast to dtype.

    Where the dtypes differ, every block is written into one buffer: use it up before taking the next.
    """
    same = weight.dtype == dtype
    shape = (0 if same else min(rows, len(weight)), weight.shape[1])
    buffer = torch.empty(shape, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        yield start, start + len(block), block if same else buffer[: len(block)].copy_(block)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # oneDNN reads the bias with unit stride, whatever its stride is
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_grad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _onednn(dy, weight.T, None)


def _onednn_add(total: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> None:
    total += _onednn_grad(dy, weight)


BLAS = Gemm("BLAS", linear, torch.matmul, torch.Tensor.addmm_)
ONEDNN = Gemm("oneDNN", _onednn, _onednn_grad, _onednn_add)
NARROW = Gemm("16 bits", linear, torch.matmul, torch.Tensor.addmm_, roundings=2)


@functools.cache
def in_float32(gemm: Gemm) -> Gemm:
    """The Gemm of 16-bit weights that casts them block by block for gemm, and rounds results once."""

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide_x = x.float()
        out = torch.empty(len(x), len(weight), dtype=x.dtype)
        for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
            wide_bias = None if bias is None else bias[start:stop].float()
            out[:, start:stop] = gemm.forward(wide_x, block, wide_bias)
        return out

    def backward(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
        add(dx, dy, weight)
        return dx.to(dy.dtype)

    def add(total: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> None:
        for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
            gemm.add(total, dy[:, start:stop].float(), block)

    return Gemm("float32", forward, backward, add)


def _block_rows(weight: torch.Tensor) -> int:
    return max(1, BLOCK_BYTES // (4 * max(1, weight.shape[1])))


class _Trial(dispatch.Trial[Gemm]):
    """A frozen layer of normal numbers, forward and backward."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.dy, self.weight = (
            torch.randn(rows, PROBE_SIZE, generator=generator).to(dtype)
            for rows in (PROBE_ROWS, PROBE_ROWS, PROBE_SIZE)
        )

    def run(self, gemm: Gemm) -> tuple[torch.Tensor, torch.Tensor]:
        return gemm.forward(self.x, self.weight, None), gemm.backward(self.dy, self.weight)

    def failures(self, gemm: Gemm) -> list[str]:
        wide = self.weight.double()
        exact = (self.x.double() @ wide.T, self.dy.double() @ wide)
        dtype = self.weight.dtype
        lines = []
        for name, got, right in zip(("y", "dx"), self.run(gemm), exact, strict=True):
            lines += deviations(
                name, got, right, dtype, operands=dtype, terms=PROBE_SIZE, roundings=gemm.roundings
            )
        return lines
