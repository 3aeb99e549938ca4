"""The implementations of the layer norm with a shrink, and the choice between them for a problem."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.installed import has_triton
from lorakernels.ops.add_layer_norm import implementations as norms
from lorakernels.ops.layer_norm_shrink import aten, check, reference
from lorakernels.ops.layer_norm_shrink.reference import Problem, Results
from lorakernels.ops.lora_linear.implementations import CHECKED_SUMS, check_triton

# which backward pass follows is chosen apart, among those of the layer norm
REFERENCE = Implementation("reference", reference.forward, norms.REFERENCE.backward)
ATEN = Implementation("aten", aten.forward, norms.ATEN.backward)

# of the kernel, which has registers for so many sums of a row
LARGEST_RANK = 128


def _fused(problem: Problem) -> Results:
    # imported here: a CPU user need not have Triton
    from lorakernels.ops.layer_norm_shrink import triton

    return triton.forward(problem)


TRITON = Implementation("triton", _fused, norms.TRITON.backward)


def select(problem: Problem, backend: str) -> Implementation:
    """The implementation of one problem: on a GPU the faster of two, elsewhere torch's operations.

    Raises:
        ValueError: backend, or the environment variable in its place, asks for Triton where it cannot run.
    """
    x, lora_a = problem.x, problem.lora_a
    (rows, k), rank = x.shape, lora_a.shape[0]
    if backend == "auto":
        backend = dispatch.default_backend()
    # an empty result needs no kernel, and GPU grids cannot be empty
    if x.numel() == 0:
        return ATEN if backend != "reference" else REFERENCE
    forced = backend != "auto"
    chosen = (_named(x, rank, backend),) if forced else candidates(x, rank)
    # a CPU has nothing to choose from, and a small one takes no longer than its launch
    if x.is_cpu or x.numel() < norms.LEAST_ELEMENTS:
        return chosen[0]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    described = _described(
        dispatch.device_name(x.device),
        x.dtype,
        lora_a.dtype,
        1 << (rows - 1).bit_length(),
        k,
        rank,
        problem.dropout_p > 0,
        tf32,
        backend,
    )
    trial = functools.partial(_Trial, problem)
    return dispatch.choose(described, chosen, trial, reference=None if forced else REFERENCE)


def candidates(x: Tensor, rank: int) -> tuple[Implementation, ...]:
    """What may compute a problem on x's device under backend="auto", the baseline first."""
    fused = x.is_cuda and x.dtype != torch.float64 and rank <= LARGEST_RANK and has_triton()
    return (ATEN, TRITON) if fused else (ATEN,)


def _named(x: Tensor, rank: int, backend: str) -> Implementation:
    """The implementation for a backend of the LoRA linear; all but two of them leave it to torch."""
    family = backend.split(":")[0]
    if family != "triton":
        return REFERENCE if family == "reference" else ATEN
    check_triton(x)
    # the LoRA linear's own kernels have no such limit
    return TRITON if rank <= LARGEST_RANK else ATEN


@functools.lru_cache
def _described(
    device: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    rows: int,
    k: int,
    rank: int,
    dropout: bool,
    tf32: bool,
    backend: str,
) -> str:
    """What `dispatch` remembers a choice under; rows is rounded up to a power of two."""
    dtypes = f"{dispatch.dtype_name(dtype)} with {dispatch.dtype_name(adapter_dtype)}"
    return (
        f"layer_norm_shrink on {device}, {dtypes} adapters, M<={rows} K={k} r={rank}"
        f"{', dropout' if dropout else ''}{', TF32' if tf32 else ''}"
        f"{'' if backend == 'auto' else f', {backend} only'}"
    )


class _Trial:
    """A random problem of the shape at hand."""

    def __init__(self, problem: Problem) -> None:
        (m, k), rank = problem.x.shape, problem.lora_a.shape[0]
        self.device = problem.x.device
        make = functools.partial(
            check.random_problem, k=k, r=rank, dtype=problem.x.dtype, adapter_dtype=problem.lora_a.dtype,
            device=self.device, eps=problem.eps, scale=problem.scale or 1.0,
        )  # fmt: skip
        plain = make(m)
        seed = torch.ones(1, dtype=torch.int64, device=self.device)
        self.timed = replace(plain, dropout_p=problem.dropout_p, seed=seed)
        self.checked = plain if m * rank >= CHECKED_SUMS else make(-(-CHECKED_SUMS // rank))

    def run(self, implementation: Implementation) -> None:
        implementation.forward(self.timed)

    def failures(self, implementation: Implementation) -> list[str]:
        return check.failures(implementation.forward(self.checked), self.checked)

    def compile(self, implementation: Implementation) -> None:
        for problem in (self.checked, self.timed):
            implementation.forward(problem)
