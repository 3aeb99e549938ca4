"""The table of implementations of the LoRA linear, and the choice among them for a problem."""

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorakernels import cpu_gemm, dispatch
from lorakernels.dispatch import Implementation
from lorakernels.installed import has_triton
from lorakernels.ops.lora_linear import aten, check, onednn, reference
from lorakernels.ops.lora_linear.problem import ALIGNMENT, Direction, Problem
from lorakernels.tolerance import accumulation_dtype

if TYPE_CHECKING:
    from lorakernels.ops.lora_linear.triton.tiles import Gemm

# One sum may cancel to nothing, and no rule holds for it: a check has at least so many of S and dS.
CHECKED_SUMS = 16

REFERENCE = Implementation("reference", reference.forward, reference.backward)
# the vendor's product is rounded before the update is added to it
ATEN = Implementation("aten", aten.forward, aten.backward, roundings=2)
ATEN_WIDE = Implementation("aten-wide", aten.forward_wide, aten.backward_wide)
ONEDNN = Implementation("onednn", onednn.forward, onednn.backward)


def candidates(problem: Problem, direction: Direction) -> tuple[Implementation, ...]:
    """What may compute a direction of a problem under backend="auto", the baseline first."""
    x = problem.x
    if not x.is_cuda:
        return (ATEN, ATEN_WIDE) if x.dtype.itemsize == 2 else (ATEN, *_onednn(x))
    usable = x.dtype != torch.float64 and has_triton()
    return (ATEN, *triton_implementations(problem, direction)) if usable else (ATEN,)


def triton_implementations(problem: Problem, direction: Direction) -> tuple[Implementation, ...]:
    """The Triton implementation with every GEMM that is offered for a direction of a problem."""
    x = problem.x
    if x.is_cpu:
        return _interpreted(x.dtype)
    # under dropout the update of dx is masked, and x is before S is made
    masked = direction == "backward" and problem.dropout_p > 0
    aligned = is_aligned(x.dtype, *problem.weight.shape)
    return _with_shipped_gemms(x.dtype, *chip_traits(x.device), aligned, masked)


def chip_traits(device: torch.device) -> tuple[int, int]:
    """What `tiles.Chip` says of a GPU."""
    properties = dispatch.device_properties(device)
    return 0 if torch.version.hip else properties.major, properties.shared_memory_per_block_optin


def is_aligned(dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether rows of N and of K elements, one after the other, begin at multiples of ALIGNMENT bytes."""
    return not (n * dtype.itemsize % ALIGNMENT or k * dtype.itemsize % ALIGNMENT)


def select(problem: Problem, backend: str, direction: Direction) -> Implementation:
    """The implementation that computes one direction of a problem.

    Raises:
        ValueError: backend, or the environment variable in its place, names what cannot run here.
    """
    x, weight, dropout_p = problem.x, problem.weight, problem.dropout_p
    rows = x.shape[0]
    if backend == "auto":
        backend = dispatch.default_backend()
    # an empty sum or result needs no kernel, and GPU grids cannot be empty
    if x.numel() == 0 or weight.numel() == 0:
        return ATEN if backend != "reference" else REFERENCE
    forced = backend != "auto"
    chosen = _named(problem, direction, backend) if forced else candidates(problem, direction)
    # it is over long before a check of it would be
    if not dispatch.is_large(rows, weight):
        return chosen[0]
    n, k = weight.shape
    kind = _Kind(
        direction,
        dispatch.device_name(x.device),
        x.dtype,
        problem.lora_a.dtype,
        dispatch.rounded_rows(rows),
        n,
        k,
        problem.lora_a.shape[0],
        weight.stride(1) != 1,
        problem.bias is not None,
        dropout_p > 0,
        x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        backend,
    )
    trial = functools.partial(_Trial, problem, direction)
    return dispatch.choose(_described(kind), chosen, trial, reference=None if forced else REFERENCE)


class _Kind(NamedTuple):
    """All that a choice depends on; rows is rounded up to a power of two."""

    direction: Direction
    device: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    rows: int
    n: int
    k: int
    rank: int
    by_columns: bool
    bias: bool
    dropout: bool
    tf32: bool
    backend: str


@functools.lru_cache
def _described(kind: _Kind) -> str:
    """What `dispatch` remembers a choice under; kept, since every forward and backward asks for it."""
    dtypes = f"{dispatch.dtype_name(kind.dtype)} with {dispatch.dtype_name(kind.adapter_dtype)}"
    return (
        f"lora_linear {kind.direction} on {kind.device}, {dtypes} adapters, "
        f"M<={kind.rows} N={kind.n} K={kind.k} r={kind.rank}"
        f"{', weight stored by columns' if kind.by_columns else ''}{'' if kind.bias else ', no bias'}"
        f"{', dropout' if kind.dropout else ''}{', TF32' if kind.tf32 else ''}"
        f"{dispatch.backend_suffix(kind.backend)}"
    )


class _Trial:
    """One direction of the problem at hand with its own weight; the rest is random, as a new lora_b is zero.

    The backward's S is the exact one, so that what is found of a backward depends on no forward.
    """

    def __init__(self, problem: Problem, direction: Direction) -> None:
        self.direction = direction
        m, rank = problem.x.shape[0], problem.lora_a.shape[0]
        self.device = problem.weight.device
        make = functools.partial(
            check.random_case, weight=problem.weight, r=rank, adapter_dtype=problem.lora_a.dtype,
            bias=problem.bias is not None, scale=problem.scale or 1.0,
        )  # fmt: skip
        plain = make(m)
        seed = torch.ones(1, dtype=torch.int64, device=self.device)
        self.timed = replace(plain, dropout_p=problem.dropout_p, seed=seed)
        self.checked = plain if m * rank >= CHECKED_SUMS else make(-(-CHECKED_SUMS // rank))

    def run(self, implementation: Implementation) -> None:
        self._results(implementation, self.timed)

    def failures(self, implementation: Implementation) -> list[str]:
        return check.failures(
            self._results(implementation, self.checked), self.checked, names=check.RESULTS_OF[self.direction],
            roundings=implementation.roundings, exact=self._exact,
        )  # fmt: skip

    def compile(self, implementation: Implementation) -> None:
        for case in (self.checked, self.timed):
            self._results(implementation, case)

    def _results(self, implementation: Implementation, case: check.Case) -> tuple[Tensor, ...]:
        if self.direction == "forward":
            return implementation.forward(case)
        # the checked case may have more rows than the timed one
        return implementation.backward(case, case.dy, self._s[: len(case.x)], (True, True, True))

    @functools.cached_property
    def _exact(self) -> check.Exact:
        """Made once for all candidates: float64 is slow on most GPUs."""
        return check.exact_results(self.checked, directions=(self.direction,))

    @functools.cached_property
    def _s(self) -> Tensor:
        return self._exact.s.to(accumulation_dtype(self.checked.x.dtype))


@functools.cache
def _with_shipped_gemms(
    dtype: torch.dtype, major: int, shared_limit: int, aligned: bool, masked: bool
) -> tuple[Implementation, ...]:
    # imported here: a CPU user need not have Triton
    from lorakernels.ops.lora_linear.triton.tiles import Chip, shipped_gemms

    chip = Chip(major, shared_limit)
    return tuple(map(with_gemm, shipped_gemms(dtype, chip, aligned=aligned, masked=masked)))


@functools.cache
def _interpreted(dtype: torch.dtype) -> tuple[Implementation, ...]:
    from lorakernels.ops.lora_linear.triton.tiles import default_gemm

    return (with_gemm(default_gemm(dtype)),)


@functools.cache
def with_gemm(gemm: "Gemm") -> Implementation:
    """The Triton implementation with that GEMM."""
    from lorakernels.ops.lora_linear import triton
    from lorakernels.ops.lora_linear.triton.tiles import Family

    # the vendor's product is rounded before the update is added to it
    roundings = 2 if gemm.family is Family.VENDOR else 1
    forward = functools.partial(triton.forward, gemm=gemm)
    backward = functools.partial(triton.backward, gemm=gemm)
    return Implementation(f"triton:{gemm}", forward, backward, roundings=roundings)


def _named(problem: Problem, direction: Direction, backend: str) -> tuple[Implementation, ...]:
    """The implementations of that name, or of that name before the colon."""
    x = problem.x
    family = backend.split(":")[0]
    if family == "triton":
        check_triton(x)
        offered = triton_implementations(problem, direction)
    else:
        offered = (REFERENCE, ATEN, ATEN_WIDE, *_onednn(x))
    named = tuple(one for one in offered if backend in (one.name, one.name.split(":")[0]))
    if not named:
        raise ValueError(
            f"backend: expected one of {', '.join(one.name for one in offered)}, got {backend!r}"
        )
    return named


def check_triton(x: Tensor) -> None:
    """Raise ValueError where Triton cannot run on x: in float64, or on a CPU without its interpreter."""
    if x.dtype == torch.float64:
        raise ValueError("backend: 'triton' computes in at most float32, got x in float64")
    if x.device.type == "cpu" and not _interpreting():
        raise ValueError("backend: 'triton' on CPU tensors needs TRITON_INTERPRET=1 and Triton installed")


def _onednn(x: Tensor) -> tuple[Implementation, ...]:
    return (ONEDNN,) if x.is_cpu and x.dtype == torch.float32 and cpu_gemm.has_onednn() else ()


def _interpreting() -> bool:
    if not has_triton():
        return False
    from triton import knobs

    return knobs.runtime.interpret
