"""lora_linear and LoRALinear: every implementation by name and what "auto" chooses, against float64."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from lorakernels import LoRALinear, RowParts, dispatch, lora_linear
from lorakernels.dispatch import Implementation
from lorakernels.ops.lora_linear import implementations
from lorakernels.ops.lora_linear.check import Case
from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.ops.lora_linear.triton.tiles import VENDOR

# M, K and N of query_key_value at 8,192 tokens: BLOOM-1b7, 7b1 and 560m.
MAIN = {"1b7": (8192, 2048, 6144), "7b1": (8192, 4096, 12288), "560m": (8192, 1024, 3072)}
RANKS = (8, 16, 64)
# M, K, N, r: no block divides them. An expanded dy, which comes last and meets the first two again, has only
# r different sums, and few of them may cancel to nothing: no rule holds for these.
RAGGED = ((333, 255, 1001, 70), (77, 129, 300, 19), (130, 63, 257, 1), (1, 517, 131, 7))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
DROPOUT = 0.1
RESULTS = ("y", "dx", "dA", "dB")
EXACT_ROWS = 2048


def first() -> list[Item]:
    """BLOOM's shapes: what "auto" chooses, and every implementation."""
    shapes = [
        ("1b7", "bf16"),
        ("7b1", "bf16"),
        ("560m", "bf16"),
        ("1b7", "fp16"),
        ("1b7", "fp32"),
        ("1b7", "tf32"),
    ]
    auto = [Item(f"lora_linear auto, {m} {d}", check_auto, {"model": m, "dtype": d}) for m, d in shapes]
    return auto + [
        Item(f"lora_linear every backend, {m} {d}", check_main_shape, {"model": m, "dtype": d})
        for m, d in shapes
    ]


def rest() -> list[Item]:
    """Odd sizes and layouts, dropout, the module."""
    return [
        *(Item(f"lora_linear odd sizes, {dtype}", check_ragged, {"dtype": dtype}) for dtype in DTYPES),
        *(Item(f"lora_linear dropout, {dtype}", check_dropout, {"dtype": dtype}) for dtype in DTYPES),
        *(Item(f"LoRALinear, {dtype}", check_module, {"dtype": dtype}) for dtype in DTYPES),
    ]


def check_main_shape(findings: Findings, setting: Setting, model: str, dtype: str) -> None:
    """Each implementation by its name, at common ranks."""
    # in a rehearsal two tiles or more in each dimension, of which the last one is ragged
    m, k, n = setting.pick(MAIN[model], (256 // DTYPES[dtype].itemsize + 4,) * 3)
    for rank in RANKS:
        with precision(dtype):
            problem = make_problem(setting, m, k, n, rank, DTYPES[dtype], torch.float32)
            exact = exact_results(problem)
            for one in named(problem):
                with forced(one):
                    judge(findings, f"r={rank} {one}", problem, results(problem), exact, one)


def check_auto(findings: Findings, setting: Setting, model: str, dtype: str) -> None:
    """What is chosen is right, no implementation is rejected and no warning is given."""
    for rank in RANKS:
        dispatch.forget()
        with precision(dtype), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            problem = main_problem(setting, model, DTYPES[dtype], rank)
            got = results(problem)
        ours = [str(one.message) for one in caught if str(one.message).startswith("lorakernels:")]
        findings.faults += [f"r={rank}: warned: {text}" for text in ours]
        winners = {}
        for problem_name, choice in dispatch.kernel_choices().items():
            winners[problem_name] = choice["winner"]
            findings.faults += [f"{name} was rejected: {why}" for name, why in choice["rejected"].items()]
        findings.notes |= winners
        with precision(dtype):
            # y is the forward's and dx the backward's; small products take the vendor's unmeasured
            most_rounded = max(winners.values(), key=roundings, default="aten")
            judge(findings, f"r={rank} auto", problem, got, exact_results(problem), most_rounded)


def check_ragged(findings: Findings, setting: Setting, dtype: str) -> None:
    """Odd sizes in every storage order, adapters of either dtype, and kind of bias."""
    layouts = ("rows", "weight by columns", "x by columns", "slice", "expanded dy")
    biases, shapes = itertools.cycle(("strided bias", "bias", "no bias")), itertools.cycle(RAGGED)
    adapters = dict.fromkeys((torch.float32, DTYPES[dtype]))
    for layout, adapter_dtype in itertools.product(layouts, adapters):
        bias, (m, k, n, r) = next(biases), next(shapes)
        m, k, n = (setting.pick(size, -(-size // 4)) for size in (m, k, n))
        with precision(dtype):
            problem = make_problem(setting, m, k, n, r, DTYPES[dtype], adapter_dtype)
            relay(problem, layout, bias)
            exact = exact_results(problem)
            for backend in ("reference", "aten", "triton"):
                name = f"{m}x{k}x{n} r={r} {layout}, {bias}, adapters {dispatch.dtype_name(adapter_dtype)}"
                got = results(problem, backend=backend)
                judge(findings, f"{name}, {backend}", problem, got, exact, backend)


def check_dropout(findings: Findings, setting: Setting, dtype: str) -> None:
    """One mask for forward and backward, of the right density, which follows torch's generator."""
    m, k, n = setting.pick((2048, 1024, 1536), (48, 80, 33))
    with precision(dtype):
        problem = make_problem(setting, m, k, n, 8, DTYPES[dtype], torch.float32)
        for one in named(replace(problem, dropout_p=DROPOUT)):
            with forced(one):
                torch.manual_seed(1)
                got = results(problem, dropout_p=DROPOUT)
                kept = kept_inputs(problem, seed=1)
                again = kept_inputs(problem, seed=1)
                other = kept_inputs(problem, seed=2)
            exact = exact_results(problem, kept.double() / (1 - DROPOUT))
            judge(findings, one, problem, got, exact, one)
            share = float(kept.double().mean())
            allowed = 5 * (DROPOUT * (1 - DROPOUT) / kept.numel()) ** 0.5
            findings.require(abs(share - (1 - DROPOUT)) < allowed, f"{one}: keeps {share:.4f} of the inputs")
            findings.require(torch.equal(kept, again), f"{one}: the same seed gave another mask")
            findings.require(not torch.equal(kept, other), f"{one}: another seed gave the same mask")


def check_module(findings: Findings, setting: Setting, dtype: str) -> None:
    """LoRALinear with all rows and with parts, eager, compiled (for bfloat16) and merged."""
    m, k = setting.pick((1024, 512), (24, 32))
    n, heads = 3 * k, 4
    with precision(dtype):
        problem = make_problem(setting, m, k, n, 8, DTYPES[dtype], torch.float32)
        linear = nn.Linear(k, n, device="meta")
        linear.weight = nn.Parameter(problem.weight, requires_grad=False)
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
        for parts in (None, RowParts(heads, ("q", "k", "v"), ("q", "v"))):
            layer = LoRALinear.from_linear(linear, 8, problem.scale, parts=parts)
            rows = torch.arange(n) if parts is None else parts.rows(n)
            rows = rows.to(setting.device)
            with torch.no_grad():
                layer.lora_a.copy_(problem.lora_a)
                layer.lora_b.copy_(problem.lora_b[rows])
            sparse = torch.zeros_like(problem.lora_b).index_copy_(0, rows, problem.lora_b[rows])
            exact = exact_results(replace(problem, lora_b=sparse))
            exact[3] = exact[3][rows]
            variants = {"eager": layer}
            if dtype == "bf16":
                variants["compiled"] = torch.compile(layer, **setting.compiler)
            for variant, function in variants.items():
                name = f"{variant}, {'all rows' if parts is None else 'parts q and v'}"
                x = problem.x.clone().requires_grad_()
                y = function(x)
                got = [y.detach(), *torch.autograd.grad(y, [x, layer.lora_a, layer.lora_b], problem.dy)]
                judge(findings, name, problem, got, exact, "aten")
            merged = layer.merged().weight
            delta = problem.scale * sparse.double() @ problem.lora_a.double()
            findings.compare(
                f"merged, {name}", merged, problem.weight.double() + delta, merged.dtype,
                operands=torch.float32, terms=8,
            )  # fmt: skip


def make_problem(
    setting: Setting, m: int, k: int, n: int, r: int, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> Case:
    """Random operands whose frozen part and update weigh about the same in y."""
    generator = torch.Generator(setting.device).manual_seed(m + k + n + r)

    def normal(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=setting.device) * size).to(dtype)

    return Case(
        x=normal(m, k),
        weight=normal(n, k, size=k**-0.5),
        bias=normal(n),
        lora_a=normal(r, k, size=k**-0.5, dtype=adapter_dtype),
        lora_b=normal(n, r, size=r**-0.5, dtype=adapter_dtype),
        scale=1.5,
        dropout_p=0.0,
        seed=torch.empty(0, dtype=torch.int64, device=setting.device),
        dy=normal(m, n),
    )


def main_problem(setting: Setting, model: str, dtype: torch.dtype, rank: int) -> Case:
    """A shape of `MAIN`, or one like it for the rehearsal."""
    m, k, n = MAIN[model]
    # the first one of the rehearsal is just large enough for a choice between implementations
    m, k, n = setting.pick((m, k, n), (m // 32, k // 16, n // 24))
    return make_problem(setting, m, k, n, rank, dtype, torch.float32)


def relay(problem: Case, layout: str, bias: str) -> None:
    """The same values in other storage orders."""
    if layout == "weight by columns":
        problem.weight = problem.weight.T.contiguous().T
    elif layout == "x by columns":
        problem.x = problem.x.T.contiguous().T
    elif layout == "slice":
        problem.x = torch.cat([problem.x, problem.x], 1)[:, : problem.x.shape[1]]
    elif layout == "expanded dy":
        problem.dy = problem.dy[:1].expand_as(problem.dy)
    if bias == "no bias":
        problem.bias = None
    elif bias == "strided bias":
        problem.bias = torch.stack([problem.bias, problem.bias + 1], 1)[:, 0]


def results(problem: Case, **options) -> list[Tensor]:
    """y, dx, dA and dB through the public function."""
    x, weight, bias, lora_a, lora_b = problem.inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (x, lora_a, lora_b)]
    y = lora_linear(leaves[0], weight, bias, *leaves[1:], problem.scale, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.dy)]


def exact_results(problem: Case, multiplier: Tensor | None = None) -> list[Tensor]:
    """y, dx, dA and dB in float64 by the formulas of Hu et al. 2021 (arXiv:2106.09685), some rows at a time.

    multiplier [M, K] is the dropout mask with its factor 1 / (1 - p).
    """
    weight, lora_a, lora_b = (tensor.double() for tensor in (problem.weight, problem.lora_a, problem.lora_b))
    bias = 0.0 if problem.bias is None else problem.bias.double()
    da, db, y, dx = torch.zeros_like(lora_a), torch.zeros_like(lora_b), [], []
    for start in range(0, len(problem.x), EXACT_ROWS):
        rows = slice(start, start + EXACT_ROWS)
        x, dy = problem.x[rows].double(), problem.dy[rows].double()
        factor = 1.0 if multiplier is None else multiplier[rows]
        s, ds = problem.scale * (x * factor) @ lora_a.T, problem.scale * dy @ lora_b
        y.append(x @ weight.T + bias + s @ lora_b.T)
        dx.append(dy @ weight + (ds @ lora_a) * factor)
        da += ds.T @ (x * factor)
        db += dy.T @ s
    return [torch.cat(y), torch.cat(dx), da, db]


def judge(
    findings: Findings,
    name: str,
    problem: Case,
    got: list[Tensor],
    exact: list[Tensor],
    implementation: str,
) -> None:
    """Each result against float64 by the rule."""
    (m, k), n = problem.x.shape, len(problem.weight)
    dtypes = (problem.x.dtype, problem.x.dtype, problem.lora_a.dtype, problem.lora_a.dtype)
    # the sum of the frozen product and, before it, that of the thin one
    terms = (2 * k, 2 * n, m + n, m + k)
    for result, dtype, one, right, length in zip(RESULTS, dtypes, got, exact, terms, strict=True):
        findings.compare(
            f"{name}: {result}", one, right, dtype,
            operands=problem.x.dtype, terms=length, roundings=roundings(implementation),
        )  # fmt: skip


def roundings(implementation: str) -> int:
    """How often the result of an implementation is rounded to 16 bits, as it declares."""
    offered = (
        implementations.REFERENCE,
        implementations.ATEN,
        implementations.ATEN_WIDE,
        implementations.ONEDNN,
        implementations.with_gemm(VENDOR),
    )
    # the other GEMMs of Triton differ in name alone
    return {one.name: one.roundings for one in offered}.get(implementation, Implementation.roundings)


def named(problem: Problem) -> list[str]:
    """Every implementation that can be asked for by name and has both directions, Triton's for each GEMM."""
    offered = implementations.triton_implementations(problem, "backward")
    return ["reference", "aten", *(one.name for one in offered)]


def kept_inputs(problem: Case, seed: int) -> Tensor:
    """The boolean mask [M, K] of the inputs that dropout keeps, read off results with lora_a a part of 1."""
    k, device = problem.x.shape[1], problem.x.device
    width, ones = 64, torch.ones_like(problem.x)
    kept = []
    for start in range(0, k, width):
        size = min(width, k - start)
        select = torch.zeros(size, k, device=device)
        select[:, start : start + size].fill_diagonal_(1.0)
        torch.manual_seed(seed)
        y = lora_linear(
            ones,
            ones.new_zeros(size, k),
            None,
            select,
            torch.eye(size, device=device),
            1.0,
            dropout_p=DROPOUT,
        )
        kept.append(y != 0)
    return torch.cat(kept, 1)


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """ "auto" takes this implementation, by its whole name."""
    os.environ["LORAKERNELS_BACKEND"] = implementation
    try:
        yield
    finally:
        del os.environ["LORAKERNELS_BACKEND"]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for float32 products where dtype says so."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
