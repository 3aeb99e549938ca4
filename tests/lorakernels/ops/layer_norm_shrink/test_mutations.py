"""The kernel broken on purpose, a line each: the check must see it.

Left out are masks without which no result changes: on rows that are never stored, and on ranks.
"""

from dataclasses import replace

import pytest
import torch

from lorakernels.ops.layer_norm_shrink import check, triton
from lorakernels.ops.lora_linear.reference import keep_mask
from tests.lorakernels.changed_module import changed

DTYPES = (torch.bfloat16, torch.float16)
M, K, R = 50, 700, 5  # no multiple of any block, and several of them
DROPOUT_P, SEED = 0.4, 7
STATISTICS = {"h", "mean, rstd"}
LINES = {
    "column mask of the statistics": ("(columns < K - k)[None, :]", "(columns < K)[None, :]", STATISTICS),
    "mean of a block": ("tl.where(ok, x - block_mean[:, None], 0.0)", "tl.where(ok, x, 0.0)", STATISTICS),
    "what means of blocks differ by": (" + delta * delta * (share * k)", "", STATISTICS),
    "share of a block": ("share = count / (count + k)", "share = 1.0", STATISTICS),
    "statistics of the row": (
        "rstd = 1.0 / tl.sqrt(squares / K + eps)",
        "rstd = tl.sum(tl.where(rows == 1, 1.0 / tl.sqrt(squares / K + eps), 0.0), 0) + 0 * squares",
        STATISTICS,
    ),
    "the mean that is kept": ("mean_ptr + rows, mean,", "mean_ptr + rows, 1.01 * mean,", {"mean, rstd"}),
    "the rstd that is kept": ("rstd_ptr + rows, rstd,", "rstd_ptr + rows, 1.01 * rstd,", {"mean, rstd"}),
    "bias": (" + norm_bias[None, :]", "", {"h"}),
    "weight": (" * norm_weight[None, :]", "", {"h"}),
    "rounding of h before the product": (
        "acc = tl.dot(h, lora_a, acc, input_precision=PRECISION)",
        "acc = tl.dot(normed, lora_a.to(tl.float32), acc)",
        {"S"},
    ),
    "low part of A": ("tl.join(high, low)", "tl.join(high, low - low)", {"S"}),
    "shift of the low part": ("high + low * (1.0 / SHIFT)", "high + low", {"S"}),
    "scale": ("acc * scale", "acc", {"S"}),
    "all but the last block": ("acc = tl.dot(h, lora_a, acc,", "acc = tl.dot(h, lora_a, 0 * acc,", {"S"}),
}  # fmt: skip


@pytest.fixture
def problem(dtype, device) -> check.Problem:
    """One whose memory beside x and A is not zero, or a missing mask would go unseen."""
    made = check.random_problem(M, K, R, dtype, torch.float32, device)
    for name in ("x", "lora_a"):
        tensor = getattr(made, name)
        wide = torch.full((3 * M, 3 * K), 3.0, dtype=tensor.dtype, device=device)
        wide[: len(tensor), :K] = tensor
        setattr(made, name, wide[: len(tensor), :K])
    return made


def wrong(run, problem: check.Problem, multiplier: torch.Tensor | None = None) -> set[str]:
    return {line.split(":")[0] for line in check.failures(run.forward(problem), problem, multiplier)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINES)
def test_the_kernel_without_it(name, problem, tmp_path):
    assert wrong(triton, problem) == set()
    line, replacement, expected = LINES[name]
    copy = changed(triton, "def layer_norm_shrink_kernel", line, replacement, tmp_path)
    if "SHIFT" in line and problem.x.dtype == torch.bfloat16:
        expected = set()  # a shift of 1
    assert wrong(copy, problem) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("line", "replacement"),
    [
        ("h = tl.where(keep, h, 0.0)", "h = tl.where(keep, h, h)"),
        ("seed_ptr, rows, k, dropout_p", "seed_ptr, rows, 0, dropout_p"),
        ("seed_ptr, rows, k, dropout_p", "seed_ptr, rows % BLOCK_M, k, dropout_p"),
        ("problem.scale / (1 - problem.dropout_p)", "problem.scale"),
    ],
    ids=["mask", "columns of the mask", "rows of the mask", "factor"],
)
def test_dropout_without_it(line, replacement, problem, tmp_path, device):
    seed = torch.tensor([SEED], device=device)
    problem = replace(problem, dropout_p=DROPOUT_P, seed=seed)
    multiplier = keep_mask(seed, M, K, DROPOUT_P) / (1 - DROPOUT_P)
    assert wrong(triton, problem, multiplier) == set()
    copy = changed(triton, "def layer_norm_shrink_kernel", line, replacement, tmp_path)
    assert wrong(copy, problem, multiplier) == {"S"}
