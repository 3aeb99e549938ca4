"""Dropout: one mask for every implementation, torch's generator as source, the statistics it promises."""

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from lorakernels import lora_linear
from lorakernels.ops.lora_linear import aten, check, implementations, reference
from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.ops.lora_linear.reference import keep_mask
from lorakernels.ops.lora_linear.triton.dropout import dropout_keep

DTYPES = ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2)
WAYS = [*itertools.product(("reference", "aten", "aten-wide", "triton"), DTYPES)]
if not torch.cuda.is_available():
    WAYS.append(("onednn", DTYPES[0]))


@triton.jit
def mask_kernel(mask_ptr, seed_ptr, first_row, n_rows, n_columns, dropout_p, BLOCK: tl.constexpr):
    first_column = tl.program_id(1) * BLOCK
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = first_column + tl.arange(0, BLOCK)
    keep = dropout_keep(seed_ptr, first_row + rows, first_column, dropout_p, BLOCK, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(mask_ptr + rows[:, None] * n_columns + columns[None, :], keep.to(tl.int8), mask=inside)


def generator_state(device: str) -> torch.Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def implementation(name: str, device: str) -> implementations.Implementation:
    x = torch.zeros(1, 1, device=device)
    return implementations.select(Problem(x, x, None, x, x, 1.0, 0.5, x), name, "forward")


def kernel_mask(
    seed: torch.Tensor, rows: int, columns: int, dropout_p: float, first_row: int = 0
) -> torch.Tensor:
    """The keep mask as the kernels make it, in tiles of another size than theirs."""
    mask = torch.zeros(rows, columns, dtype=torch.int8, device=seed.device)
    mask_kernel[(triton.cdiv(rows, 128), triton.cdiv(columns, 128))](
        mask, seed, first_row, rows, columns, dropout_p, BLOCK=128
    )
    return mask.bool()


@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 1 / 3, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("shape", [(150, 131), (1, 1), (3, 1000)], ids=str)
@pytest.mark.parametrize("seed", [0, 12345678901234567, 2**63 - 1, -1])
def test_the_mask_of_the_kernels_and_of_aten_is_one(seed, shape, dropout_p, device, monkeypatch):
    monkeypatch.setattr(reference, "CPU_COUNTERS", 100)  # several blocks of rows
    seed = torch.tensor([seed], device=device)
    assert torch.equal(kernel_mask(seed, *shape, dropout_p), keep_mask(seed, *shape, dropout_p))


def test_rows_beyond_32_bits_have_masks_of_their_own(device):
    seed, first_row = torch.tensor([12345678901234567], device=device), 2**33 + 5
    words = reference._philox(seed, torch.arange(20, device=device), first_row, 30)
    kept = torch.stack([word >= 2**31 for word in words], -1).flatten(1)
    assert torch.equal(kept, kernel_mask(seed, 30, 80, 0.5, first_row))
    assert not torch.equal(kept, kernel_mask(seed, 30, 80, 0.5, 5))


def test_philox_is_that_of_its_authors(monkeypatch):
    """The known answer for zeros of Random123's kat_vectors, for philox4x32 with ten rounds."""
    monkeypatch.setattr(reference, "PHILOX_ROUNDS", 10)
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference._philox(zero, zero, 0, 1)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_in_aten_never_waits_for_the_device(dtype):
    """On meta tensors whatever reads a value raises."""
    weight = torch.empty(40, 24, dtype=dtype, device="meta")
    x, dy = (torch.empty(10, size, dtype=dtype, device="meta") for size in (24, 40))
    lora_a, lora_b = torch.empty(4, 24, device="meta"), torch.empty(40, 4, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    problem = Problem(x, weight, None, lora_a, lora_b, 1.0, 0.5, seed)
    y, s = aten.forward(problem)
    gradients = aten.backward(problem, dy, s, (True, True, True))
    assert [t.shape for t in (y, *gradients)] == [dy.shape, x.shape, lora_a.shape, lora_b.shape]


@pytest.mark.parametrize("shape", [(37, 50, 70, 4), (130, 65, 33, 20)], ids=str)
@pytest.mark.parametrize(("name", "dtypes"), WAYS)
def test_forward_and_backward_use_the_mask_of_the_seed(name, shape, dtypes, device):
    m, n, k, r = shape
    dropout_p, seed = 0.4, torch.tensor([12345678901234567], device=device)
    weight = torch.randn(n, k, device=device).div(k**0.5).to(dtypes[0])
    problem = check.random_case(m, weight, r, dtypes[1], bias=False)
    run = implementation(name, device)
    dropped = replace(problem, dropout_p=dropout_p, seed=seed)
    results = check.run_results(run.forward, run.backward, dropped)
    multiplier = keep_mask(seed, m, k, dropout_p) / (1 - dropout_p)
    assert check.failures(results, problem, multiplier, roundings=run.roundings) == []
    # the same results against another mask: the test can fail
    other = keep_mask(seed + 1, m, k, dropout_p) / (1 - dropout_p)
    assert [line[:2] for line in check.failures(results, problem, other)] == ["y:", "dx", "dA", "dB"]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_statistics_of_the_mask(dropout_p, device):
    rows, columns = 500, 400
    masks = [
        keep_mask(torch.tensor([seed], device=device), rows, columns, dropout_p).double()
        for seed in (1, 2, 2**62 + 3)
    ]
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    for mask in masks:
        centred = (mask - (1 - dropout_p)) / deviation
        assert abs(centred.mean()) < 5 / (rows * columns) ** 0.5
        assert centred.mean(0).abs().max() < 5 / rows**0.5
        assert centred.mean(1).abs().max() < 5 / columns**0.5
        for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(4, 1)):
            assert abs((centred * shifted).mean()) < 5 / (rows * columns) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = (masks[one] - (1 - dropout_p)) * (masks[other] - (1 - dropout_p)) / deviation**2
        assert abs(both.mean()) < 5 / (rows * columns) ** 0.5


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_mask_follows_torch_manual_seed(backend, device):
    x, weight = torch.randn(20, 30, device=device), torch.zeros(40, 30, device=device)
    lora_a, lora_b = torch.randn(4, 30, device=device), torch.randn(40, 4, device=device)

    def run(seed: int | None, training: bool = True) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return lora_linear(
            x, weight, None, lora_a, lora_b, 1.0, dropout_p=0.5, training=training, backend=backend
        )

    first = run(0)
    second = run(None)
    assert torch.equal(first, run(0))
    assert torch.equal(second, run(None))
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(1))
    torch.testing.assert_close(run(0, training=False), x @ lora_a.T @ lora_b.T)
    state = torch.get_rng_state()
    run(None, training=False)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_mean_over_masks_is_the_value_without_dropout(backend, device):
    problem = check.random_case(8, torch.zeros(24, 16, device=device), 4, torch.float32, bias=False)
    x, weight, _, lora_a, lora_b = problem.inputs
    many = x.repeat(400, 1)
    dropped = lora_linear(many, weight, None, lora_a, lora_b, 1.0, dropout_p=0.2, backend=backend)
    full = lora_linear(x, weight, None, lora_a, lora_b, 1.0, backend=backend)
    spread = dropped.view(400, 8, 24).std(0) / 400**0.5
    assert ((dropped.view(400, 8, 24).mean(0) - full).abs() < 5 * spread + 1e-6).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("installed", [False, True])
def test_aten_is_a_candidate_on_a_gpu(installed, direction, dropout_p, monkeypatch):
    tile = implementations.Implementation("triton:tile", None, None)
    monkeypatch.setattr(implementations, "has_triton", lambda: installed)
    monkeypatch.setattr(implementations, "triton_implementations", lambda *_: (tile,))
    on_gpu = SimpleNamespace(x=SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), dropout_p=dropout_p)
    names = [one.name for one in implementations.candidates(on_gpu, direction)]
    assert names == ["aten", *(["triton:tile"] if installed else [])]


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_a_given_seed_fixes_the_mask_and_nothing_is_drawn(backend, device):
    m, n, k, r = 20, 40, 30, 4
    seed = torch.tensor([-12345678901234567], device=device)
    problem = check.random_case(m, torch.randn(n, k, device=device), r, torch.float32)
    leaves = [one.detach().requires_grad_() for one in (problem.x, problem.lora_a, problem.lora_b)]
    x, lora_a, lora_b = leaves
    state = generator_state(device)
    y = lora_linear(
        x, problem.weight, problem.bias, lora_a, lora_b, problem.scale, dropout_p=0.4, backend=backend,
        seed=seed,
    )  # fmt: skip
    results = [y.detach(), *torch.autograd.grad(y, leaves, problem.dy)]
    assert torch.equal(generator_state(device), state)
    multiplier = keep_mask(seed, m, k, 0.4) / (1 - 0.4)
    assert check.failures(results, problem, multiplier) == []
    other = keep_mask(seed + 1, m, k, 0.4) / (1 - 0.4)
    assert check.failures(results, problem, other) != []


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), ValueError, r"seed: expected shape \[1\], got \[2\]"),
        (torch.zeros(1), TypeError, "seed: expected torch.int64, got torch.float32"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "seed: expected x's device"),
    ],
)
def test_a_seed_that_does_not_fit_is_refused(seed, error, message):
    x, weight = torch.randn(5, 6), torch.randn(7, 6)
    with pytest.raises(error, match=message):
        lora_linear(x, weight, None, torch.randn(2, 6), torch.randn(7, 2), 1.0, dropout_p=0.5, seed=seed)


def test_a_seed_without_dropout_is_unused_and_one_beside_shrunk_is_refused():
    x, weight, lora_a, lora_b = torch.randn(5, 6), torch.randn(7, 6), torch.randn(2, 6), torch.randn(7, 2)
    seed = torch.tensor([7])
    plain = lora_linear(x, weight, None, lora_a, lora_b, 1.0)
    assert torch.equal(lora_linear(x, weight, None, lora_a, lora_b, 1.0, seed=seed), plain)
    dropped = functools.partial(lora_linear, x, weight, None, lora_a, lora_b, 1.0, dropout_p=0.5, seed=seed)
    assert torch.equal(dropped(training=False), plain)
    assert not torch.equal(dropped(), plain)
    with pytest.raises(ValueError, match="seed: expected None beside shrunk"):
        dropped(shrunk=(x @ lora_a.T, seed))
