"""The implementations of the layer norm of a sum, and the choice between them, for each direction apart."""

import functools

import torch
from torch import Tensor

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.installed import has_triton
from lorakernels.ops.add_layer_norm import aten, check, reference
from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem, Results
from lorakernels.ops.lora_linear.implementations import check_triton

# Of x for a measurement on a GPU: they are read and written in 2 us at 4.26 TB/s, less than a launch takes.
LEAST_ELEMENTS = 2**21
# Columns: of fewer the gradient cancels almost to nothing, and no rule holds for it.
LEAST_WIDTH = 32
# Bytes of a row that the kernels have registers for.
LARGEST_ROW = 2**15


def _fused(problem: Problem) -> Results:
    # imported here: a CPU user need not have Triton
    from lorakernels.ops.add_layer_norm import triton

    return triton.forward(problem)


def _fused_backward(problem: BackwardProblem) -> Tensor:
    from lorakernels.ops.add_layer_norm import triton

    return triton.backward(problem)


REFERENCE = Implementation("reference", reference.forward, reference.backward)
# the layer norm's gradient is rounded before it is added to
ATEN = Implementation("aten", aten.forward, aten.backward, roundings=2)
TRITON = Implementation("triton", _fused, _fused_backward)


def select(problem: Problem | BackwardProblem, backend: str) -> Implementation:
    """The implementation of one direction: on a GPU the faster of two, elsewhere torch's operations.

    Raises:
        ValueError: backend, or the environment variable in its place, asks for Triton where it cannot run.
    """
    x = problem.x
    rows, k = x.shape
    if backend == "auto":
        backend = dispatch.default_backend()
    # an empty result needs no kernel, and GPU grids cannot be empty
    if x.numel() == 0:
        return ATEN if backend != "reference" else REFERENCE
    forced = backend != "auto"
    chosen = (_named(x, backend),) if forced else candidates(x)
    # a CPU has nothing to choose from, and a small one takes no longer than its launch
    if x.is_cpu or x.numel() < LEAST_ELEMENTS or k < LEAST_WIDTH:
        return chosen[0]
    described = _described(
        _direction(problem), dispatch.device_name(x.device), x.dtype, 1 << (rows - 1).bit_length(), k, backend
    )
    trial = functools.partial(_Trial, problem)
    return dispatch.choose(described, chosen, trial, reference=None if forced else REFERENCE)


def candidates(x: Tensor) -> tuple[Implementation, ...]:
    """What may compute a problem on x's device under backend="auto", the baseline first."""
    fused = x.is_cuda and x.dtype != torch.float64 and _fits(x) and has_triton()
    return (ATEN, TRITON) if fused else (ATEN,)


def _named(x: Tensor, backend: str) -> Implementation:
    """The implementation for a backend of the LoRA linear; all but two of them leave it to torch."""
    family = backend.split(":")[0]
    if family != "triton":
        return REFERENCE if family == "reference" else ATEN
    check_triton(x)
    return TRITON if _fits(x) else ATEN


def _fits(x: Tensor) -> bool:
    """Whether the kernels have registers for a row of x."""
    return x.shape[1] * x.dtype.itemsize <= LARGEST_ROW


def _direction(problem: Problem | BackwardProblem) -> str:
    if isinstance(problem, Problem):
        return "forward"
    return "backward" if problem.dt is not None else "backward, nothing added"


@functools.lru_cache
def _described(direction: str, device: str, dtype: torch.dtype, rows: int, k: int, backend: str) -> str:
    """What `dispatch` remembers a choice under; rows is rounded up to a power of two."""
    return (
        f"add_layer_norm {direction} on {device}, {dispatch.dtype_name(dtype)}, M<={rows} K={k}"
        f"{'' if backend == 'auto' else f', {backend} only'}"
    )


class _Trial:
    """A random problem of the direction and the shape at hand."""

    def __init__(self, problem: Problem | BackwardProblem) -> None:
        x, (m, k) = problem.x, problem.x.shape
        self.device = x.device
        self.problem: Problem | BackwardProblem
        if isinstance(problem, Problem):
            self.problem = check.random_problem(m, k, x.dtype, x.device, eps=problem.eps)
        else:
            adds = problem.dt is not None
            self.problem = check.random_backward_problem(m, k, x.dtype, x.device, adds=adds)

    def run(self, implementation: Implementation) -> None:
        self._results(implementation)

    def failures(self, implementation: Implementation) -> list[str]:
        results = self._results(implementation)
        if isinstance(self.problem, Problem):
            return check.failures(results, self.problem)
        return check.backward_failures(results, self.problem, implementation.roundings)

    def compile(self, implementation: Implementation) -> None:
        self.run(implementation)

    def _results(self, implementation: Implementation):
        if isinstance(self.problem, Problem):
            return implementation.forward(self.problem)
        return implementation.backward(self.problem)
