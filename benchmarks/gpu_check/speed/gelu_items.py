"""The gradient of BLOOM-1b7's last layer through GELU, by every implementation."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed.sides import MODES, Case, Side
from benchmarks.interleave import ONLY
from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.frozen_linear import check
from lorakernels.ops.frozen_linear.implementations import ATEN, fused, select
from lorakernels.ops.frozen_linear.reference import Problem

FLOOR, OURS = "its product alone", "lorakernels"


def items() -> list[Item]:
    """Eagerly and as a graph."""
    return [
        Item(f"gradient through GELU{suffix}", check_gradient, {"mode": mode}, limit=60.0)
        for mode, suffix in MODES.items()
    ]


def check_gradient(findings: Findings, setting: Setting, mode: str) -> None:
    """What is chosen, and each one that may be, in bfloat16."""
    m, n, k = setting.pick((8192, 2048, 8192), (48, 64, 96))
    generator = torch.Generator(setting.device).manual_seed(0)
    weight = torch.randn(n, k, device=setting.device, generator=generator).div_(n**0.5).to(torch.bfloat16)
    problem = check.random_problem(m, weight)
    exact = check.exact_gradient(problem)
    builders: dict[str, Callable[[], Side]] = {
        FLOOR: lambda: Side({ONLY: lambda: problem.dy @ weight}),
        OURS: lambda: make_side(problem, exact, select(problem)),
    }
    for one in (ATEN, *fused(problem)):
        builders[f"{OURS}, {one.name}"] = functools.partial(make_side, problem, exact, one)
    dtype = dispatch.dtype_name(weight.dtype)
    Case(
        "gelu_gradient[bloom-1b7]",
        "frozen_linear",
        f"gradient of bloom-1b7's dense_4h_to_h through GELU, M={m} K={k} N={n} {dtype}",
        FLOOR,
        mode,
        seconds=2.0,
        extra={
            "case": {"model": "bloom-1b7", "M": m, "K": k, "N": n, "dtype": dtype},
            "flops": dict.fromkeys((FLOOR, OURS), 2 * m * n * k),
        },
    ).measure(findings, setting, builders)


def make_side(problem: Problem, exact: Tensor, one: Implementation) -> Side:
    """The gradient alone, without autograd."""

    def results() -> list[Tensor]:
        return [one.backward(*problem)]

    def wrong(got: list[Tensor]) -> list[str]:
        return check.failures(got[0], problem, roundings=one.roundings, exact=exact)

    return Side({ONLY: results}, results, [("dx", exact)], wrong)
