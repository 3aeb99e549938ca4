"""How right an implementation of the LoRA linear is, against the plain expression in float64.

The bounds are those of `lorakernels.tolerance`. A sum counts with the sums that its terms are made of: K + r
terms for y, K for S, N + r for dx, M + N for dA, whose dS are sums of N, and M + K for dB, whose S are sums
of K. The tests, the benchmarks and the self-check before an implementation is first used all use it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakernels.ops.lora_linear.problem import DIRECTIONS, Direction, Problem
from lorakernels.ops.lora_linear.reference import plain_lora_linear
from lorakernels.tolerance import accumulation_dtype, deviations, structured_deviations

# of forward and backward together, and of each alone: S is what any backward takes from any forward
RESULTS = ("y", "dx", "dA", "dB")
RESULTS_OF: dict[Direction, tuple[str, ...]] = {"forward": ("y", "S"), "backward": ("dx", "dA", "dB")}
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


@dataclass(frozen=True)
class Exact:
    """What is right, in float64, by name: of y, dx, dA, dB, S [M, r] and dS [M, r] what was asked for."""

    named: dict[str, Tensor]

    @property
    def results(self) -> list[Tensor]:
        """y, dx, dA and dB."""
        return [self.named[name] for name in RESULTS]

    @property
    def s(self) -> Tensor:
        """S = scale·drop(x)·Aᵀ."""
        return self.named["S"]

    @property
    def ds(self) -> Tensor:
        """dS = scale·dy·B."""
        return self.named["dS"]


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
    y, leaves, dy = _plain_expression(case, multiplier, wide)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _plain_expression(
    case: Case, multiplier: Tensor | None, wide: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, the leaves that it depends on (x, A and B) and dy."""

    def given(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if wide else tensor.detach()

    x, weight, lora_a, lora_b, dy = map(given, (case.x, case.weight, case.lora_a, case.lora_b, case.dy))
    bias = None if case.bias is None else given(case.bias)
    if multiplier is not None:
        multiplier = multiplier.to(x.dtype)
    leaves = [x.requires_grad_(), lora_a.requires_grad_(), lora_b.requires_grad_()]
    return plain_lora_linear(x, weight, bias, lora_a, lora_b, case.scale, multiplier), leaves, dy


def exact_results(
    case: Case, multiplier: Tensor | None = None, *, directions: Sequence[Direction] = DIRECTIONS
) -> Exact:
    """What is right in these directions, and S; some rows at a time: beside y and dx no long tensor is in
    float64.
    """
    (m, k), (n, r) = case.x.shape, case.lora_b.shape
    lengths = {"S": r}
    if "forward" in directions:
        lengths["y"] = n
    if "backward" in directions:
        lengths |= {"dx": k, "dS": r}
    named = {name: case.x.new_empty(m, length, dtype=torch.float64) for name, length in lengths.items()}
    if "backward" in directions:
        named |= {"dA": torch.zeros_like(case.lora_a, dtype=torch.float64)}
        named |= {"dB": torch.zeros_like(case.lora_b, dtype=torch.float64)}
    for start in range(0, m, EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        part = replace(case, x=case.x[rows], dy=case.dy[rows])
        kept = None if multiplier is None else multiplier[rows]
        with torch.set_grad_enabled("backward" in directions):
            y, leaves, dy = _plain_expression(part, kept, wide=True)
        if "forward" in directions:
            named["y"][rows] = y.detach()
        if "backward" in directions:
            named["dx"][rows], part_a, part_b = torch.autograd.grad(y, leaves, dy)
            named["dA"] += part_a
            named["dB"] += part_b
            named["dS"][rows] = case.scale * part.dy.double() @ case.lora_b.double()
        dropped = part.x.double() if kept is None else part.x.double() * kept
        named["S"][rows] = case.scale * dropped @ case.lora_a.double().T
    return Exact(named)


def rules(case: Case, roundings: int = 1, *, names: Sequence[str] = RESULTS) -> dict[str, dict]:
    """What `tolerance.deviations` must know of each result; roundings counts those of y and dx in 16 bits.

    S and dS are wider everywhere, which leaves dA and dB one rounding.
    """
    (m, k), (n, r), operands = case.x.shape, case.lora_b.shape, case.x.dtype
    wide = {"operands": operands, "roundings": roundings, "dtype": operands}
    thin = {"operands": operands, "roundings": 1, "dtype": case.lora_a.dtype}
    of = {
        "y": {**wide, "terms": k + r},
        "S": {**thin, "dtype": accumulation_dtype(operands), "terms": k},
        "dx": {**wide, "terms": n + r},
        "dA": {**thin, "terms": m + n},
        "dB": {**thin, "terms": m + k},
    }
    return {name: of[name] for name in names}


def failures(
    results: Sequence[Tensor],
    case: Case,
    multiplier: Tensor | None = None,
    *,
    names: Sequence[str] = RESULTS,
    roundings: int = 1,
    exact: Exact | None = None,
) -> list[str]:
    """One line for each way in which results, called names, are further from float64 than the rule allows.

    The factors of case must be random, since the errors of a 16-bit y and dx are seen through them too: a
    low part of the update that was dropped stands out there alone. exact is that of case, where the caller
    has it.
    """
    exact = exact or exact_results(case, multiplier)
    # what update there is in y and dx, from the right and from the left; with one column or sums of one term
    # the errors of right results have such a structure too
    factors = {"y": (case.lora_b, "S"), "dx": (case.lora_a.T, "dS")}
    if min(case.weight.shape) == 1:
        factors = {}
    lines = []
    for (name, rule), got in zip(rules(case, roundings, names=names).items(), results, strict=True):
        right = exact.named[name]
        found = deviations(name, got, right, **rule)
        if not found and got.dtype.itemsize == 2 and name in factors:
            from_right, from_left = factors[name][0].double(), exact.named[factors[name][1]]
            found += structured_deviations(f"{name} (update)", got, right, from_right, **rule)
            found += structured_deviations(f"{name} (update)", got.T, right.T, from_left, **rule)
        lines += found
    return lines


def run_results(forward: Callable, backward: Callable, case: Case) -> list[Tensor]:
    """y, dx, dA and dB of an implementation, as `Problem` describes its functions."""
    y, s = forward(case)
    return [y, *backward(case, case.dy, s, (True, True, True))]
