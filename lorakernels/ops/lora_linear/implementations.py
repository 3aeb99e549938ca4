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
from lorakernels.ops.lora_linear.problem import Problem

if TYPE_CHECKING:
    from lorakernels.ops.lora_linear.triton import Tile

# One sum may cancel to nothing, and no rule holds for it: a check has at least so many of S and dS.
CHECKED_SUMS = 16

REFERENCE = Implementation("reference", reference.forward, reference.backward)
# the vendor's product is rounded before the update is added to it
ATEN = Implementation("aten", aten.forward, aten.backward, roundings=2)
ATEN_WIDE = Implementation("aten-wide", aten.forward_wide, aten.backward_wide)
ONEDNN = Implementation("onednn", onednn.forward, onednn.backward)


def candidates(x: Tensor, dropout_p: float) -> tuple[Implementation, ...]:
    """What may compute a problem on x's device under backend="auto", the baseline first."""
    if not x.is_cuda:
        return (ATEN, ATEN_WIDE) if x.dtype.itemsize == 2 else (ATEN, *_onednn(x))
    usable = x.dtype != torch.float64 and has_triton()
    return (ATEN, *triton_implementations(x, dropout_p)) if usable else (ATEN,)


def triton_implementations(x: Tensor, dropout_p: float) -> tuple[Implementation, ...]:
    """The Triton implementation in every shipped tile that fits x's device."""
    # imported here: a CPU user need not have Triton
    from lorakernels.ops.lora_linear import triton

    if x.device.type == "cpu":
        return (_in_tile(triton.default_tile(x.dtype)),)
    properties = torch.cuda.get_device_properties(x.device)
    limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    return tuple(_in_tile(tile) for tile in triton.shipped_tiles(x.dtype, limit, dropout_p > 0))


def select(problem: Problem, backend: str) -> Implementation:
    """The implementation of one problem; one of them may run forward and another backward.

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
    chosen = _named(x, dropout_p, backend) if forced else candidates(x, dropout_p)
    # a small product on a CPU is over long before a check of it would be
    if x.is_cpu and not cpu_gemm.is_large(rows, weight):
        return chosen[0]
    n, k = weight.shape
    kind = _Kind(
        dispatch.device_name(x.device),
        x.dtype,
        problem.lora_a.dtype,
        1 << (rows - 1).bit_length(),
        n,
        k,
        problem.lora_a.shape[0],
        weight.stride(1) != 1,
        problem.bias is not None,
        dropout_p > 0,
        x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        backend,
    )
    trial = functools.partial(_Trial, problem)
    return dispatch.choose(_described(kind), chosen, trial, reference=None if forced else REFERENCE)


class _Kind(NamedTuple):
    """All that a choice depends on; rows is rounded up to a power of two."""

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
        f"lora_linear on {kind.device}, {dtypes} adapters, M<={kind.rows} N={kind.n} K={kind.k} r={kind.rank}"
        f"{', weight stored by columns' if kind.by_columns else ''}{'' if kind.bias else ', no bias'}"
        f"{', dropout' if kind.dropout else ''}{', TF32' if kind.tf32 else ''}"
        f"{'' if kind.backend == 'auto' else f', {kind.backend} only'}"
    )


class _Trial:
    """The problem at hand with its own weight; the rest is random, for a new lora_b and bias are zero."""

    def __init__(self, problem: Problem) -> None:
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
        check.run_results(implementation.forward, implementation.backward, self.timed)

    def failures(self, implementation: Implementation) -> list[str]:
        results = check.run_results(implementation.forward, implementation.backward, self.checked)
        return check.failures(results, self.checked, roundings=implementation.roundings, exact=self._exact)

    @functools.cached_property
    def _exact(self) -> check.Exact:
        """Made once for all candidates: float64 is slow on most GPUs."""
        return check.exact_results(self.checked)


@functools.cache
def _in_tile(tile: "Tile") -> Implementation:
    from lorakernels.ops.lora_linear import triton

    forward = functools.partial(triton.forward, tile=tile)
    return Implementation(f"triton:{tile}", forward, functools.partial(triton.backward, tile=tile))


def _named(x: Tensor, dropout_p: float, backend: str) -> tuple[Implementation, ...]:
    """The implementations of that name, or of that name before the colon."""
    family = backend.split(":")[0]
    if family == "triton":
        check_triton(x)
        offered = triton_implementations(x, dropout_p)
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
