"""The implementations of the layer norm of a sum, and the choice between them, for each direction apart."""

import functools

import torch
from torch import Tensor

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.add_layer_norm import aten, check, reference
from lorakernels.ops.add_layer_norm.choice import Implementations
from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem, Results

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
IMPLEMENTATIONS = Implementations(REFERENCE, ATEN, TRITON)


def select(problem: Problem | BackwardProblem, backend: str) -> Implementation:
    """The implementation of one direction; ValueError as of `Implementations.select`."""
    x = problem.x
    rows, k = x.shape

    def describe(backend: str) -> str:
        device, bucket = dispatch.device_name(x.device), dispatch.rounded_rows(rows)
        return _described(_direction(problem), device, x.dtype, bucket, k, backend)

    return IMPLEMENTATIONS.select(
        x,
        backend,
        fits=k * x.dtype.itemsize <= LARGEST_ROW,
        describe=describe,
        make_trial=functools.partial(_Trial, problem),
        least_width=LEAST_WIDTH,
    )


def _direction(problem: Problem | BackwardProblem) -> str:
    if isinstance(problem, Problem):
        return "forward"
    return "backward" if problem.dt is not None else "backward, nothing added"


@functools.lru_cache
def _described(direction: str, device: str, dtype: torch.dtype, rows: int, k: int, backend: str) -> str:
    """What `dispatch` remembers a choice under; rows is rounded up to a power of two."""
    return (
        f"add_layer_norm {direction} on {device}, {dispatch.dtype_name(dtype)}, M<={rows} K={k}"
        f"{dispatch.backend_suffix(backend)}"
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
