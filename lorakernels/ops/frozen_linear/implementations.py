"""The implementations of the layer after GELU on a GPU, and the choice between them for a problem.

They differ in the gradient. In the forward pass a kernel that wrote gelu(x) beside x would save one reading
of x, 31 us of 434 in BLOOM-1b7 (computed); its GEMM was up to 11% slower than the vendor's on an H200.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.installed import has_triton
from lorakernels.ops.frozen_linear import aten, check, reference
from lorakernels.ops.frozen_linear.reference import Problem
from lorakernels.ops.lora_linear.implementations import chip_traits, is_aligned

if TYPE_CHECKING:
    from lorakernels.ops.lora_linear.triton.tiles import Tile

REFERENCE = Implementation("reference", aten.forward, reference.backward)
# the vendor's product is rounded before it is multiplied by GELU's derivative
ATEN = Implementation("aten", aten.forward, aten.backward, roundings=2)

# `chip_traits` where Triton's interpreter runs a kernel: those of the chips that have it
INTERPRETED = 9, 227 * 1024


def select(problem: Problem) -> Implementation:
    """The implementation of the gradient of one problem, the faster one where there are several."""
    weight, rows = problem.weight, len(problem.dy)
    # an empty result needs no kernel, and GPU grids cannot be empty
    if problem.dy.numel() == 0 or problem.x.numel() == 0:
        return ATEN
    backend = dispatch.default_backend()
    if backend == "auto":
        chosen = (ATEN, *fused(problem))
    else:
        # a backend of the LoRA linear: what has no counterpart here leaves it to torch
        offered = (REFERENCE, ATEN, *fused(problem))
        named = (one for one in offered if backend in (one.name, one.name.split(":")[0]))
        chosen = tuple(named) or (ATEN,)
    # a small one takes no longer than its launches
    if chosen == (ATEN,) or not dispatch.is_large(rows, weight):
        return chosen[0]
    described = _described(
        dispatch.device_name(weight.device),
        dispatch.dtype_name(weight.dtype),
        dispatch.rounded_rows(rows),
        *weight.shape,
        weight.stride(1) != 1,
        backend,
    )
    trial = functools.partial(_Trial, problem)
    return dispatch.choose(described, chosen, trial, reference=REFERENCE if backend == "auto" else None)


def fused(problem: Problem) -> tuple[Implementation, ...]:
    """The kernel with every tile that is offered for a problem: none where its GEMM cannot run."""
    weight = problem.weight
    if weight.dtype.itemsize != 2 or not has_triton():
        return ()
    # imported here: a CPU user need not have Triton
    from lorakernels.ops.lora_linear.triton.tma_gemm import describable

    stored = weight if weight.stride(1) == 1 else weight.T
    if not (is_aligned(weight.dtype, *weight.shape) and describable(stored)):
        return ()
    traits = INTERPRETED if weight.is_cpu else chip_traits(weight.device)
    return _with_shipped_tiles(weight.dtype, *traits)


@functools.cache
def _with_shipped_tiles(dtype: torch.dtype, major: int, shared_limit: int) -> tuple[Implementation, ...]:
    from lorakernels.ops.lora_linear.triton.tiles import Chip, Family, shipped_gemms

    gemms = shipped_gemms(dtype, Chip(major, shared_limit), aligned=True, masked=False)
    return tuple(with_tile(one.tile) for one in gemms if one.family is Family.TMA)


def with_tile(tile: "Tile") -> Implementation:
    """The kernel with that tile."""
    from lorakernels.ops.frozen_linear import triton
    from lorakernels.ops.lora_linear.triton.tiles import Family, Gemm

    backward = functools.partial(triton.backward, tile=tile)
    return Implementation(f"triton:{Gemm(Family.TMA, tile)}", aten.forward, backward)


@functools.lru_cache
def _described(device: str, dtype: str, rows: int, n: int, k: int, by_columns: bool, backend: str) -> str:
    """What `dispatch` remembers a choice under; rows is rounded up to a power of two."""
    return (
        f"frozen_linear backward through GELU on {device}, {dtype}, M<={rows} N={n} K={k}"
        f"{', weight stored by columns' if by_columns else ''}"
        f"{dispatch.backend_suffix(backend)}"
    )


class _Trial:
    """The problem at hand with its own weight; the rest is random."""

    def __init__(self, problem: Problem) -> None:
        self.device = problem.weight.device
        self.problem = check.random_problem(len(problem.dy), problem.weight)

    def run(self, implementation: Implementation) -> Tensor:
        return implementation.backward(*self.problem)

    def failures(self, implementation: Implementation) -> list[str]:
        return check.failures(
            self.run(implementation), self.problem, roundings=implementation.roundings, exact=self._exact
        )

    def compile(self, implementation: Implementation) -> None:
        self.run(implementation)

    @functools.cached_property
    def _exact(self) -> Tensor:
        """Made once for all candidates: float64 is slow on most GPUs."""
        return check.exact_gradient(self.problem)
