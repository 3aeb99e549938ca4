"""How right an implementation of the LoRA linear is, against the plain expression in float64.

A result passes when its relative Frobenius error is at most 1.2 times that of the plain torch expression in
the same dtypes, plus 4 eps (float32, float64) or eps / sqrt(number of elements) (16 bits). A right kernel
never fails that; a wrong one does. The tests, the benchmarks and the self-check before an implementation is
first used all ask here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.reference import plain_lora_linear
from lorakernels.tolerance import error_bound, relative_error

RESULTS = ("y", "dx", "dA", "dB")
EXACT_ROWS = 2048


@dataclass
class Problem:
    """One LoRA linear and the gradient of its output, in the shapes of reference.py."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """x, weight, bias, lora_a, lora_b."""
        return self.x, self.weight, self.bias, self.lora_a, self.lora_b


def random_problem(
    m: int,
    weight: Tensor,
    bias: Tensor | None,
    r: int,
    adapter_dtype: torch.dtype,
    *,
    scale: float = 1.5,
    seed: int = 0,
) -> Problem:
    """Normal x [M, K], dy [M, N] and adapters of rank r, of a size like the weight's, around that weight and
    bias.

    The global random state is left alone.
    """
    (n, k), device = weight.shape, weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = weight.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return (values * size).to(dtype)

    return Problem(
        x=normal(m, k),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        lora_a=normal(r, k, size=1 / math.sqrt(k), dtype=adapter_dtype),
        lora_b=normal(n, r, size=1 / math.sqrt(r), dtype=adapter_dtype),
        dy=normal(m, n),
        scale=scale,
    )


def plain_results(problem: Problem, multiplier: Tensor | None = None, *, wide: bool = False) -> list[Tensor]:
    """y, dx, dA and dB of the plain expression by autograd, in float64 where wide."""
    tensors = [t if t is None else t.detach() for t in problem.inputs]
    dy = problem.dy
    if wide:
        tensors = [t if t is None else t.double() for t in tensors]
        dy = dy.double()
    if multiplier is not None:
        multiplier = multiplier.to(tensors[0].dtype)
    x, weight, bias, lora_a, lora_b = tensors
    leaves = [x.requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]
    y = plain_lora_linear(x, weight, bias, lora_a, lora_b, problem.scale, multiplier)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _exact_results(problem: Problem, multiplier: Tensor | None) -> list[Tensor]:
    """y, dx, dA and dB in float64, some rows at a time: a long batch need not fit in float64 at once."""
    parts = []
    for start in range(0, max(problem.x.shape[0], 1), EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        part = replace(problem, x=problem.x[rows], dy=problem.dy[rows])
        parts.append(plain_results(part, None if multiplier is None else multiplier[rows], wide=True))
    y, dx, da, db = zip(*parts, strict=True)
    return [torch.cat(y), torch.cat(dx), sum(da), sum(db)]


def failures(results: list[Tensor], problem: Problem, multiplier: Tensor | None = None) -> list[str]:
    """One line for each of y, dx, dA and dB that is further from float64 than the rule allows."""
    exact = _exact_results(problem, multiplier)
    plain = plain_results(problem, multiplier)
    lines = []
    for name, got, yardstick, right in zip(RESULTS, results, plain, exact, strict=True):
        error = relative_error(got, right)
        bound = error_bound(relative_error(yardstick, right), yardstick.dtype, right.numel())
        if got.dtype != yardstick.dtype:
            lines.append(f"{name}: {got.dtype} in place of {yardstick.dtype}")
        if not error <= bound:
            lines.append(f"{name}: relative error {error:.3g} above the bound {bound:.3g}")
    return lines


def run_results(
    forward: Callable,
    backward: Callable,
    problem: Problem,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """y, dx, dA and dB of an implementation with the signatures of reference.py; seed [1] for dropout."""
    x, weight, _, lora_a, lora_b = problem.inputs
    if seed is None:
        seed = torch.empty(0, dtype=torch.int64, device=x.device)
    y, s = forward(*problem.inputs, problem.scale, dropout_p, seed)
    needs = (True, True, True)
    grads = backward(problem.dy, x, weight, lora_a, lora_b, s, problem.scale, dropout_p, seed, needs)
    return [y, *grads]
