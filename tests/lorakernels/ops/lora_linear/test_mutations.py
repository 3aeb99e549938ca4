"""Kernels and the ATen path broken on purpose, a line each: the check must see it.

Left out are masks without which no result changes: on rows and columns that are never stored, and on the
padding of a rank, which meets zeros.
"""

import importlib
import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lorakernels.ops.lora_linear import aten, check, implementations
from lorakernels.ops.lora_linear import triton as shipped
from lorakernels.ops.lora_linear.reference import keep_mask
from lorakernels.ops.lora_linear.triton import tma_gemm
from lorakernels.ops.lora_linear.triton.thin import ThinTile
from lorakernels.ops.lora_linear.triton.tiles import VENDOR, Family, Gemm, Tile
from tests.lorakernels.changed_module import changed

DTYPES = (torch.bfloat16, torch.float16)
# no multiple of any block, and every sum is split; rows are aligned, as TMA wants them
M, N, K = 150, 104, 144
ONE_PASS, TWO_PASSES = 5, 20  # ranks for which dS and dB are made together, and apart
POINTER, TMA = None, Gemm(Family.TMA, Tile(32, 64, 32, 4, 2))
ALL = {"y", "dx", "dA", "dB"}


@dataclass(frozen=True)
class Mutation:
    """line of file, where it first stands after start, replaced; expected are wrong then, at least."""

    file: str
    start: str
    line: str
    replacement: str
    expected: set[str]
    gemm: Gemm | None = POINTER
    rank: int = ONE_PASS


def shrink(line: str, replacement: str, expected: set[str], **options) -> Mutation:
    return Mutation("thin.py", "def lora_linear_shrink_kernel(", line, replacement, expected, **options)


def one_pass(line: str, replacement: str, expected: set[str]) -> Mutation:
    return Mutation("thin.py", "def lora_linear_backward_kernel(", line, replacement, expected)


def sums(line: str, replacement: str, expected: set[str], **options) -> Mutation:
    return Mutation("thin.py", "def lora_linear_sum_kernel(", line, replacement, expected, **options)


def parts(line: str, replacement: str, expected: set[str], **options) -> Mutation:
    return Mutation("parts.py", "@triton.jit", line, replacement, expected, **options)


def pointer(line: str, replacement: str, expected: set[str]) -> Mutation:
    return Mutation("pointer_gemm.py", "@triton.jit", line, replacement, expected)


def tma(line: str, replacement: str, expected: set[str]) -> Mutation:
    return Mutation("tma_gemm.py", "@triton.jit", line, replacement, expected, gemm=TMA)


def vendor(line: str, replacement: str, expected: set[str]) -> Mutation:
    return Mutation("vendor_gemm.py", "def product", line, replacement, expected, gemm=VENDOR)


TRITON = {
    "K mask of S": shrink("k_ok = columns < K - k", "k_ok = columns < K - k + BLOCK_K", {"y", "dB"}),
    "low part of A": shrink("high, low, LOW, SHIFT", "high, low, 0, SHIFT", {"y", "dB"}),
    "low part of B, apart": shrink("high, low, LOW, SHIFT", "high, low, 0, SHIFT", ALL, rank=TWO_PASSES),
    "scale of S": shrink("total *= scale\n", "\n", {"y", "dB"}),
    "scale of dS, apart": shrink("total *= scale\n", "\n", ALL, rank=TWO_PASSES),
    "scale of dS": parts("total *= scale\n", "\n", {"dx", "dA"}),
    "all but the first partial sum": parts(
        "for index in range(count):", "for index in range(1):", {"dx", "dA", "dB"}
    ),
    "low part of S and dS in the GEMM": parts(
        "second = low if LAYOUT", "second = high - high if LAYOUT", {"y", "dx"}
    ),
    "low part of B and A in the GEMM": parts("LEFT else low\n", "LEFT else low - low\n", {"y", "dx"}),
    "N mask": one_pass("cols < N - first_col", "cols < N - first_col + BLOCK_N", {"dx", "dA"}),
    "M mask of dB": one_pass("row_ok = rows < end - m", "row_ok = rows < M", {"dB"}),
    "low part of B": one_pass("b_high, b_low, B_LOW, SHIFT", "b_high, b_low, 0, SHIFT", {"dx", "dA"}),
    "low part of S": one_pass("s_high, s_low, S_LOW, SHIFT", "s_high, s_low, 0, SHIFT", {"dB"}),
    "M mask of dA": sums("row_ok = rows < end - m", "row_ok = rows < M", {"dA"}),
    "low part of dS": sums("high, low, LOW, SHIFT", "high, low, 0, SHIFT", {"dA"}),
    "low part of S, apart": sums(
        "high, low, LOW, SHIFT", "high, low, 0, SHIFT", {"dA", "dB"}, rank=TWO_PASSES
    ),
    "K mask": pointer("tl.where(update, R, K),", "tl.where(update, R, K + BLOCK_K),", {"y", "dx"}),
    "rank mask": pointer("tl.where(update, R, K),", "tl.where(update, R + BLOCK_K, K),", {"y", "dx"}),
    "update": pointer("trips = trips_k + tl.cdiv(R, BLOCK_K)", "trips = trips_k", {"y", "dx"}),
    "bias": pointer("    if BIAS:", "    if BIAS and M < 0:", {"y"}),
    "update by TMA": tma("range(trips_k + trips_r)", "range(trips_k)", {"y", "dx"}),
    "first block of the update by TMA": tma("(trip - trips_k) * BLOCK_K", "trip * BLOCK_K", {"y", "dx"}),
    "last tiles by TMA": tma(
        "blocks_m * blocks_n, PROGRAMS", "blocks_m * blocks_n - 1, PROGRAMS", {"y", "dx"}
    ),
    "bias by TMA": tma("        if BIAS:", "        if BIAS and M < 0:", {"y"}),
    "update by the vendor": vendor("return y.addmm_", "return y\n    y.addmm_", {"y", "dx"}),
    "bias by the vendor": vendor("if bias is None else", "if True else", {"y"}),
}  # fmt: skip
DROPOUT = {
    "mask of x": shrink("x = tl.where(keep, x, 0.0)", "x = tl.where(keep, x, x)", {"y", "dB"}),
    "mask of x in dA": sums("x = tl.where(keep, x, 0.0)", "x = tl.where(keep, x, x)", {"dA"}),
    "rank mask": pointer("right_tile_ptr, k, R,", "right_tile_ptr, k, R + BLOCK_K,", {"dx"}),
    "mask of the update": pointer("tl.where(keep, acc, 0.0)", "tl.where(keep, acc, acc)", {"dx"}),
    "mask of the update by TMA": tma("tl.where(keep, acc, 0.0)", "tl.where(keep, acc, acc)", {"dx"}),
    "masked update by TMA": tma("for trip in range(trips_r):", "for trip in range(0):", {"dx"}),
}
ATEN = {
    "update of y": ("return _add_product(y, s, lora_b.T), s", "return y, s", {"y"}),
    "update of dx": ("_add_product(dx, ds, lora_a)", "pass", {"dx"}),
    "bias": ("torch.addmm(bias, x, weight.T)", "torch.mm(x, weight.T)", {"y"}),
    "scale of S": (
        "* (problem.scale / (1 - problem.dropout_p))\n\n\ndef thin", "\n\n\ndef thin", {"y", "dB"},
    ),
    "scale of dS": (
        "product(dy, lora_b) * (problem.scale / (1 - problem.dropout_p))", "product(dy, lora_b)",
        {"dx", "dA"},
    ),
    "low part of S and dS": (
        "_residue(a, left[:, 0], out=left[:, 1])", "left[:, 1] = 0", {"y", "dx"},
    ),
    "low part of B and A": ("_residue(b, right[0], out=right[2])", "right[2] = 0", {"y", "dx"}),
    "low parts in the thin products": (
        "return torch.add(high, low, alpha=1 / shift)", "return high", {"y", "dx", "dA", "dB"},
    ),
}  # fmt: skip


@pytest.fixture
def mutated(tmp_path: Path) -> Callable[[Mutation], ModuleType]:
    """The package of the Triton implementation, copied with one line replaced."""
    name = f"mutated_{tmp_path.name}"

    def copy(mutation: Mutation) -> ModuleType:
        folder = tmp_path / name
        shutil.copytree(Path(shipped.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for path in folder.glob("*.py"):
            path.write_text(path.read_text().replace(shipped.__name__, name))
        replace_line(folder / mutation.file, mutation.start, mutation.line, mutation.replacement)
        sys.path.insert(0, str(tmp_path))
        return importlib.import_module(name)

    yield copy
    sys.path[:] = [one for one in sys.path if one != str(tmp_path)]
    for one in [one for one in sys.modules if one.split(".")[0] == name]:
        del sys.modules[one]


def replace_line(path: Path, start: str, line: str, replacement: str) -> None:
    """Replace line in a file where it first stands after start."""
    source = path.read_text()
    at = source.index(start)
    assert line in source[at:], f"{line!r} is no longer after {start}: update the mutation"
    path.write_text(source[:at] + source[at:].replace(line, replacement, 1))


def embedded(tensor: torch.Tensor) -> torch.Tensor:
    """tensor within a larger one: what lies beside it must not be zero, or a missing mask would go unseen."""
    wide = torch.full((3 * M, 3 * M + 6), 3.0, dtype=tensor.dtype, device=tensor.device)
    wide[: tensor.shape[0], : tensor.shape[1]] = tensor
    return wide[: tensor.shape[0], : tensor.shape[1]]


@pytest.fixture
def spare_memory(monkeypatch):
    """A kernel that leaves its tensor, as some of these do, stays in memory of its own, which is NaN."""
    shipped = torch.empty

    def empty(*shape, **options):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = torch.Size(shape).numel()
        return shipped(size + 2**16, **options)[:size].view(shape)

    monkeypatch.setattr(torch, "empty", empty)


def make_problem(dtype: torch.dtype, device: str, rank: int = ONE_PASS) -> check.Case:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).div(K**0.5)
    problem = check.random_case(M, weight.to(device, dtype), rank, torch.float32)
    for name in ("x", "weight", "lora_a", "lora_b", "dy"):
        setattr(problem, name, embedded(getattr(problem, name)))
    return problem


def wrong_results(run, problem: check.Case, *dropout, roundings: int = 1, **options) -> set[str]:
    """The names of those that the check finds wrong; dropout is its probability and seed."""
    multiplier = None
    if dropout:
        dropout_p, seed = dropout
        multiplier = keep_mask(seed, M, K, dropout_p) / (1 - dropout_p)
        problem = replace(problem, dropout_p=dropout_p, seed=seed)
    y, s = run.forward(problem, **options)
    results = [y, *run.backward(problem, problem.dy, s, (True, True, True), **options)]
    lines = check.failures(results, problem, multiplier, roundings=roundings)
    return {line.split(":")[0].split()[0] for line in lines}


def assert_seen(mutation: Mutation, mutated, problem: check.Case, monkeypatch, *dropout) -> None:
    """The shipped implementation is right, and the mutated one wrong where it must be."""
    # several blocks of dy's columns, so that dS has partial sums
    narrow = {2: ThinTile(64, 64, 4, 2)}
    options = {"gemm": mutation.gemm, "roundings": 2 if mutation.gemm == VENDOR else 1}
    copy = mutated(mutation)
    for package in (shipped, copy):
        monkeypatch.setattr(package.thin, "PASS_TILES", narrow)
    assert not wrong_results(shipped, problem, *dropout, **options)
    # families and layouts are compared by identity
    gemm = mutation.gemm and copy.tiles.Gemm(copy.tiles.Family(mutation.gemm.family), mutation.gemm.tile)
    assert wrong_results(copy, problem, *dropout, **(options | {"gemm": gemm})) >= mutation.expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_a_kernel_without_it(name, dtype, mutated, monkeypatch, device, spare_memory):
    mutation = TRITON[name]
    assert_seen(mutation, mutated, make_problem(dtype, device, mutation.rank), monkeypatch)


@pytest.mark.parametrize("name", DROPOUT)
def test_a_kernel_with_dropout_without_it(name, mutated, monkeypatch, device, spare_memory):
    problem, dropout = make_problem(torch.bfloat16, device), (0.4, torch.tensor([7], device=device))
    assert_seen(DROPOUT[name], mutated, problem, monkeypatch, *dropout)


@dataclass(frozen=True)
class OnDevice:
    """As much of a CUDA tensor as a descriptor is made of."""

    address: int
    shape: tuple[int, int]
    strides: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda:0"
    is_cuda: bool = True

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, int]:
        return self.strides


FIRST = OnDevice(256, (64, 32), (32, 1))
OTHERS = {
    "address": replace(FIRST, address=512),
    "shape": replace(FIRST, shape=(128, 32)),
    "strides": replace(FIRST, strides=(40, 1)),
    "dtype": replace(FIRST, dtype=torch.float16),
}


def describes(module: ModuleType, tensor: OnDevice, block: tuple[int, int]) -> bool:
    """Whether the descriptor that is handed out is that of the tensor."""
    got = module.descriptor(tensor, block)
    found = (
        got.base.data_ptr(),
        tuple(got.shape),
        tuple(got.strides),
        got.base.dtype,
        tuple(got.block_shape),
    )
    return found == (tensor.address, tensor.shape, tensor.strides, tensor.dtype, block)


def test_a_descriptor_is_that_of_the_tensor():
    for tensor in (FIRST, *OTHERS.values(), FIRST):
        assert describes(tma_gemm, tensor, (16, 16))
        assert describes(tma_gemm, tensor, (32, 16))
    assert tma_gemm.descriptor(FIRST, (16, 16)) is tma_gemm.descriptor(replace(FIRST), (16, 16))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("address", "tensor.data_ptr()"),
        ("shape", "tuple(tensor.shape)"),
        ("strides", "tensor.stride()"),
        ("dtype", "tensor.dtype"),
    ],
)
def test_a_stale_descriptor(name, part, mutated):
    first = {
        "address": "256", "shape": "(64, 32)", "strides": "(32, 1)", "dtype": "torch.bfloat16",
    }  # fmt: skip
    copy = mutated(Mutation("tma_gemm.py", "return _kept_descriptor(", part, first[name], set()))
    assert describes(copy.tma_gemm, FIRST, (16, 16))
    assert not describes(copy.tma_gemm, OTHERS[name], (16, 16))


@pytest.mark.parametrize(("dtype", "name"), list(itertools.product(DTYPES, ATEN)), ids=str)
def test_the_aten_path_without_it(dtype, name, tmp_path, device):
    problem, roundings = make_problem(dtype, device), implementations.ATEN.roundings
    # the path of CUDA tensors, whose 16-bit products into float32 a CPU lacks
    on_cpu = (
        ("if a.is_cuda:", "if True:"),
        ("torch.mm(a, b, out_dtype=torch.float32)", "torch.mm(a.float(), b.float())"),
        (
            "torch.mm(a, parts.flatten(1), out_dtype=torch.float32)",
            "torch.mm(a.float(), parts.flatten(1).float())",
        ),
    )
    assert not wrong_results(changed(aten, "", "", "", tmp_path, on_cpu), problem, roundings=roundings)
    line, replacement, expected = ATEN[name]
    copy = changed(aten, "", line, replacement, tmp_path, on_cpu)
    assert wrong_results(copy, problem, roundings=roundings) == expected
