"""The implementations of the layer norm with a shrink, and the choice between them for a problem."""

import functools
from dataclasses import replace

import torch

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.add_layer_norm import implementations as norms
from lorakernels.ops.add_layer_norm.choice import Implementations
from lorakernels.ops.layer_norm_shrink import aten, check, reference
from lorakernels.ops.layer_norm_shrink.reference import Problem, Results
from lorakernels.ops.lora_linear.implementations import CHECKED_SUMS

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
IMPLEMENTATIONS = Implementations(REFERENCE, ATEN, TRITON)


def select(problem: Problem, backend: str) -> Implementation:
    """The implementation of one problem; ValueError as of `Implementations.select`."""
    x, lora_a = problem.x, problem.lora_a
    (rows, k), rank = x.shape, lora_a.shape[0]

    def describe(backend: str) -> str:
        return _described(
            dispatch.device_name(x.device),
            x.dtype,
            lora_a.dtype,
            dispatch.rounded_rows(rows),
            k,
            rank,
            problem.dropout_p > 0,
            x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
            backend,
        )

    return IMPLEMENTATIONS.select(
        x,
        backend,
        fits=rank <= LARGEST_RANK,
        describe=describe,
        make_trial=functools.partial(_Trial, problem),
    )


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
        f"{dispatch.backend_suffix(backend)}"
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
