"""Dropout: one mask for forward and backward, torch's generator as source, the statistics it promises."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from lorakernels import lora_linear
from lorakernels.ops.lora_linear import check, implementations
from lorakernels.ops.lora_linear.kernels import dropout_keep
from lorakernels.ops.lora_linear.reference import keep_mask

DTYPES = ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2)
WAYS = [*itertools.product(("reference", "aten", "aten-wide", "triton"), DTYPES)]
if not torch.cuda.is_available():
    WAYS.append(("onednn", DTYPES[0]))


@triton.jit
def mask_kernel(mask_ptr, seed_ptr, n_rows, n_columns, dropout_p, BLOCK: tl.constexpr):
    first_column = tl.program_id(1) * BLOCK
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = first_column + tl.arange(0, BLOCK)
    keep = dropout_keep(seed_ptr, rows, first_column, dropout_p, BLOCK, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(mask_ptr + rows[:, None] * n_columns + columns[None, :], keep.to(tl.int8), mask=inside)


def implementation(name: str, device: str) -> implementations.Implementation:
    x = torch.zeros(1, 1, device=device)
    return implementations.select(x, x, None, x, 1.0, 0.5, name)


def mask_of(name: str, rows: int, columns: int, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """The keep mask as the kernels make it, in tiles of another size than theirs."""
    if name != "triton":
        return keep_mask(seed, rows, columns, dropout_p, seed.device)
    mask = torch.zeros(rows, columns, dtype=torch.int8, device=seed.device)
    mask_kernel[(triton.cdiv(rows, 128), triton.cdiv(columns, 128))](
        mask, seed, rows, columns, dropout_p, BLOCK=128
    )
    return mask.bool()


@pytest.mark.parametrize("shape", [(37, 50, 70, 4), (130, 65, 33, 20)], ids=str)
@pytest.mark.parametrize(("name", "dtypes"), WAYS)
def test_backward_uses_the_mask_of_the_forward(name, shape, dtypes, device):
    m, n, k, r = shape
    dropout_p, seed = 0.4, torch.tensor([12345678901234567], device=device)
    weight = torch.randn(n, k, device=device).div(k**0.5).to(dtypes[0])
    problem = check.random_problem(m, weight, r, dtypes[1], bias=False)
    run = implementation(name, device)
    results = check.run_results(run.forward, run.backward, problem, dropout_p, seed)
    multiplier = mask_of(name, m, k, dropout_p, seed) / (1 - dropout_p)
    assert check.failures(results, problem, multiplier, roundings=run.roundings) == []
    # the same results against another mask: the test can fail
    other = mask_of(name, m, k, dropout_p, seed + 1) / (1 - dropout_p)
    assert [line[:2] for line in check.failures(results, problem, other)] == ["y:", "dx", "dA", "dB"]


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["aten", "triton"])
def test_statistics_of_the_mask(name, dropout_p, device):
    rows, columns = 500, 400
    masks = [
        mask_of(name, rows, columns, dropout_p, torch.tensor([seed], device=device)).double()
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
    problem = check.random_problem(8, torch.zeros(24, 16, device=device), 4, torch.float32, bias=False)
    x, weight, _, lora_a, lora_b = problem.inputs
    many = x.repeat(400, 1)
    dropped = lora_linear(many, weight, None, lora_a, lora_b, 1.0, dropout_p=0.2, backend=backend)
    full = lora_linear(x, weight, None, lora_a, lora_b, 1.0, backend=backend)
    spread = dropped.view(400, 8, 24).std(0) / 400**0.5
    assert ((dropped.view(400, 8, 24).mean(0) - full).abs() < 5 * spread + 1e-6).all()
