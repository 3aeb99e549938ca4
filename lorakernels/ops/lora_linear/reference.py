"""The LoRA linear in plain torch: the definition of correct, in any floating dtype, float64 included.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1) adds a low-rank update to a frozen
linear:

    y = x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ        x [M, K]   W [N, K]   b [N]   A [r, K]   B [N, r]

With S = s·drop(x)·Aᵀ and dS = s·dy·B the gradients are

    dx = dy·W + drop'(dS·A)       dA = dSᵀ·drop(x)       dB = dyᵀ·S

where drop' applies the forward's mask and its factor 1 / (1 - p) to the LoRA part alone.
"""

import ctypes
import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakernels.ops.lora_linear.problem import Gradients, Needs, Problem
from lorakernels.tolerance import accumulation_dtype

# Philox4x32 (Salmon et al. 2011); by their table 2 seven rounds pass every test of BigCrush.
PHILOX_ROUNDS = 7
PHILOX_A, PHILOX_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
CPU_COUNTERS = 2**16


def keep_mask(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The boolean mask [rows, columns] of inputs that dropout keeps, on seed's device.

    seed is the int64 tensor [1] that the forward drew. The mask is Philox4x32-7 (Salmon et al. 2011,
    https://doi.org/10.1145/2063384.2063405) of (column // 4, row) under that key, four columns a counter, in
    int64 arithmetic on the device: nothing waits for the seed's value, and the bits are those that the Triton
    kernels make (`kernels.dropout_keep`).
    """
    counters = -(-columns // 4)
    mask = torch.empty(rows, counters, 4, dtype=torch.bool, device=seed.device)
    groups = torch.arange(counters, device=seed.device)
    # on a CPU as many counters at a time as stay in the cache; elsewhere the fewest launches
    block_rows = max(1, CPU_COUNTERS // max(1, counters)) if seed.is_cpu else max(1, rows)
    # words have 32 bits, of which the upper 24 are compared with the probability in float32
    threshold = math.ceil(ctypes.c_float(dropout_p).value * 2**24) << 8
    for first in range(0, rows, block_rows):
        block = mask[first : first + block_rows]
        for index, word in enumerate(_philox(seed, groups, first, len(block))):
            torch.ge(word, threshold, out=block[:, :, index])
    return mask.flatten(1)[:, :columns]


def _philox(seed: Tensor, groups: Tensor, first_row: int, rows: int) -> tuple[Tensor, ...]:
    """The four words, each [rows, groups], of Philox4x32 at the counters (group, row, row >> 32, 0).

    Words are the lower 32 bits of int64: products wrap at 64 bits, which leaves all 32 upper bits of the
    64-bit product right after the shift and mask.
    """
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    key_0, key_1 = seed & WORD, (seed >> 32) & WORD
    c0, c1, c2, c3 = groups[None], row & WORD, row >> 32, torch.zeros_like(row)
    for _ in range(PHILOX_ROUNDS):
        left, right = c2 * PHILOX_B, c0 * PHILOX_A
        c0 = (left >> 32).bitwise_xor(c1).bitwise_xor_(key_0).bitwise_and_(WORD)
        c2 = (right >> 32).bitwise_xor(c3).bitwise_xor_(key_1).bitwise_and_(WORD)
        # their upper bits are dropped where they are used
        c1, c3 = left, right
        key_0, key_1 = (key_0 + PHILOX_KEY_A) & WORD, (key_1 + PHILOX_KEY_B) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def kept_inputs(problem: Problem) -> Tensor | None:
    """The mask [M, K] of the elements of x that dropout keeps, None where there is no dropout."""
    if not problem.dropout_p:
        return None
    rows, columns = problem.x.shape
    return keep_mask(problem.seed, rows, columns, problem.dropout_p)


def plain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    multiplier: Tensor | None = None,
) -> Tensor:
    """The textbook expression, differentiated by autograd: what a user would write, and the yardstick of
    error.

    Shapes as in the module's docstring, x of any leading dimensions. multiplier, shaped like x, is the
    dropout mask with its factor 1 / (1 - p). Adapters in a wider dtype than x are applied in theirs, as PEFT
    does.
    """
    dropped = x if multiplier is None else x * multiplier
    inner = linear(dropped.to(lora_a.dtype), lora_a)
    return (linear(x, weight, bias) + scale * linear(inner, lora_b)).to(x.dtype)


def shrink(x: Tensor, lora_a: Tensor, scale: float, dropout_p: float, keep: Tensor | None) -> Tensor:
    """S = scale·drop(x)·Aᵀ, [M, r] in `accumulation_dtype`; keep [M, K] is dropout's mask, or None."""
    wide = accumulation_dtype(x.dtype)
    dropped = x.to(wide) if keep is None else x.to(wide) * keep / (1 - dropout_p)
    return scale * linear(dropped, lora_a.to(wide))


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in `accumulation_dtype`, scale included; only y is rounded."""
    x, bias = problem.x, problem.bias
    wide = accumulation_dtype(x.dtype)
    s = problem.s
    if s is None:
        s = shrink(x, problem.lora_a, problem.scale, problem.dropout_p, kept_inputs(problem))
    frozen = linear(x.to(wide), problem.weight.to(wide), None if bias is None else bias.to(wide))
    return (frozen + linear(s, problem.lora_b.to(wide))).to(x.dtype), s


def backward(problem: Problem, dy: Tensor, s: Tensor, needs: Needs) -> Gradients:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    x, lora_a, lora_b, keep = problem.x, problem.lora_a, problem.lora_b, kept_inputs(problem)
    need_x, need_a, need_b = needs
    wide = accumulation_dtype(x.dtype)
    wide_dy = dy.to(wide)
    multiplier = 1.0 if keep is None else keep.to(wide) / (1 - problem.dropout_p)
    ds = problem.scale * (wide_dy @ lora_b.to(wide))
    dx = da = db = None
    if need_x:
        dx = (wide_dy @ problem.weight.to(wide) + (ds @ lora_a.to(wide)) * multiplier).to(x.dtype)
    if need_a:
        da = (ds.T @ (x.to(wide) * multiplier)).to(lora_a.dtype)
    if need_b:
        db = (wide_dy.T @ s).to(lora_b.dtype)
    return dx, da, db
