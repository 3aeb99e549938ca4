"""How right an implementation of the LoRA linear is, against the plain expression in float64.

The bounds are those of `lorakernels.tolerance`. A sum counts with the sums that its terms are made of: K + r
terms for y, N + r for dx, M + N for dA, whose dS are sums of N, and M + K for dB, whose S are sums of K.
The tests, the benchmarks and the self-check before an implementation is first used all use it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.ops.lora_linear.reference import plain_lora_linear
from lorakernels.tolerance import accumulation_dtype, deviations, structured_deviations

RESULTS = ("y", "dx", "dA", "dB")
EXACT_ROWS = 2048
# The update over x·Wᵀ and over dy·W. A dropped low part of a factor adds as much to the squared error of one
# rounding as the update has of the result's square: two thirds or more, where the rule allows a fifth.
UPDATE_SHARE = 2.0


@dataclass(slots=True, eq=False)
class Case(Problem):
    """A problem and dy [M, N], the gradient of its output."""

    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """x, weight, bias, lora_a, lora_b."""
        return self.x, self.weight, self.bias, self.lora_a, self.lora_b


@dataclass
class Exact:
    """The four results, S [M, r] and dS [M, r] in float64."""

    results: list[Tensor]
    s: Tensor
    ds: Tensor


def random_case(
    m: int,
    weight: Tensor,
    r: int,
    adapter_dtype: torch.dtype,
    *,
    bias: bool = True,
    scale: float = 1.5,
    seed: int = 0,
) -> Case:
    """A case without dropout around weight [N, K]: normal x [M, K], dy [M, N], bias and adapters of rank r.

    None of them is negligible. In root mean squares, for a weight of w: x is 1, x·Wᵀ and the bias are
    w·sqrt(K); dy is 1 / sqrt(N), so that float16 holds the gradients of a long batch, and dy·W is w. With A
    of a / sqrt(K) and B of b the update is scale·sqrt(r)·a·b in y and scale·sqrt(r / K)·a·b in dx: a·b =
    UPDATE_SHARE·w·sqrt(K) / (scale·sqrt(r)) makes it UPDATE_SHARE times the product with the weight in both,
    so that a fault of either part or of the bias shows. A and B share the scale, so that float16 holds both
    and their products. The global random state is left alone.
    """
    (n, k), device = weight.shape, weight.device
    # far from the seeds of callers, which may have drawn the weight with one: x must not repeat it
    generator = torch.Generator(device).manual_seed(2**31 + seed)
    norm = torch.linalg.vector_norm(weight.detach(), dtype=accumulation_dtype(weight.dtype))
    frozen, root = float(norm) / math.sqrt(n) or 1.0, math.sqrt(abs(scale))

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = weight.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return (values * size).to(dtype)

    return Case(
        x=normal(m, k),
        weight=weight.detach(),
        bias=normal(n, size=frozen) if bias else None,
        lora_a=normal(r, k, size=1 / (root * math.sqrt(k)), dtype=adapter_dtype),
        lora_b=normal(n, r, size=UPDATE_SHARE * frozen / (root * math.sqrt(r)), dtype=adapter_dtype),
        scale=scale,
        dropout_p=0.0,
        seed=torch.empty(0, dtype=torch.int64, device=device),
        dy=normal(m, n, size=1 / math.sqrt(n)),
    )


def plain_results(case: Case, multiplier: Tensor | None = None, *, wide: bool = False) -> list[Tensor]:
    """y, dx, dA and dB of the plain expression by autograd, in float64 where wide."""

    def given(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if wide else tensor.detach()

    x, weight, lora_a, lora_b, dy = map(given, (case.x, case.weight, case.lora_a, case.lora_b, case.dy))
    bias = None if case.bias is None else given(case.bias)
    if multiplier is not None:
        multiplier = multiplier.to(x.dtype)
    leaves = [x.requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]
    y = plain_lora_linear(x, weight, bias, lora_a, lora_b, case.scale, multiplier)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def exact_results(case: Case, multiplier: Tensor | None = None) -> Exact:
    """What is right, some rows at a time: beside y and dx themselves no long tensor is in float64."""
    (m, k), (n, r) = case.x.shape, case.lora_b.shape
    y, dx, s, ds = (case.x.new_empty(m, size, dtype=torch.float64) for size in (n, k, r, r))
    da, db = (torch.zeros_like(t, dtype=torch.float64) for t in (case.lora_a, case.lora_b))
    for start in range(0, m, EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        part = replace(case, x=case.x[rows], dy=case.dy[rows])
        kept = None if multiplier is None else multiplier[rows]
        y[rows], dx[rows], part_a, part_b = plain_results(part, kept, wide=True)
        da += part_a
        db += part_b
        dropped = part.x.double() if kept is None else part.x.double() * kept
        s[rows] = case.scale * dropped @ case.lora_a.double().T
        ds[rows] = case.scale * part.dy.double() @ case.lora_b.double()
    return Exact([y, dx, da, db], s, ds)


def rules(case: Case, roundings: int = 1) -> dict[str, dict]:
    """What `tolerance.deviations` must know of each result; roundings counts those of y and dx in 16 bits.

    S and dS are wider everywhere, which leaves dA and dB one rounding.
    """
    (m, k), (n, r), operands = case.x.shape, case.lora_b.shape, case.x.dtype
    wide = {"operands": operands, "roundings": roundings, "dtype": operands}
    thin = {"operands": operands, "roundings": 1, "dtype": case.lora_a.dtype}
    lengths = (k + r, n + r, m + n, m + k)
    return {
        name: {**kind, "terms": terms}
        for name, kind, terms in zip(RESULTS, (wide, wide, thin, thin), lengths, strict=True)
    }


def failures(
    results: list[Tensor],
    case: Case,
    multiplier: Tensor | None = None,
    *,
    roundings: int = 1,
    exact: Exact | None = None,
) -> list[str]:
    """One line for each way in which y, dx, dA and dB are further from float64 than the rule allows.

    The factors of case must be random, since the errors of a 16-bit y and dx are seen through them too: a
    low part of the update that was dropped stands out there alone. exact is that of case, where the caller
    has it.
    """
    exact = exact or exact_results(case, multiplier)
    # what update there is in y and dx, from the right and from the left; with one column or sums of one term
    # the errors of right results have such a structure too
    factors = {"y": (case.lora_b, exact.s), "dx": (case.lora_a.T, exact.ds)}
    if min(case.weight.shape) == 1:
        factors = {}
    lines = []
    for (name, rule), got, right in zip(rules(case, roundings).items(), results, exact.results, strict=True):
        found = deviations(name, got, right, **rule)
        if not found and got.dtype.itemsize == 2 and name in factors:
            from_right, from_left = (factor.double() for factor in factors[name])
            found += structured_deviations(f"{name} (update)", got, right, from_right, **rule)
            found += structured_deviations(f"{name} (update)", got.T, right.T, from_left, **rule)
        lines += found
    return lines


def run_results(forward: Callable, backward: Callable, case: Case) -> list[Tensor]:
    """y, dx, dA and dB of an implementation, as `Problem` describes its functions."""
    y, s = forward(case)
    return [y, *backward(case, case.dy, s, (True, True, True))]
