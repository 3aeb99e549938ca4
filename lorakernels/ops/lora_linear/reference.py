"""The LoRA linear in plain torch: the definition of correct, in any floating dtype, float64 included.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1) adds a low-rank update to a frozen
linear:

    y = x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ        x [M, K]   W [N, K]   b [N]   A [r, K]   B [N, r]

With S = s·drop(x)·Aᵀ and dS = s·dy·B the gradients are

    dx = dy·W + drop'(dS·A)       dA = dSᵀ·drop(x)       dB = dyᵀ·S

where drop' applies the forward's mask and its factor 1 / (1 - p) to the LoRA part alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def keep_mask(seed: Tensor, rows: int, columns: int, dropout_p: float, device: torch.device) -> Tensor:
    """The boolean mask [rows, columns] of inputs that dropout keeps; the same seed gives the same mask.

    seed is the int64 tensor [1] that the forward drew. Reading it waits for the device; the Triton kernels do
    not.
    """
    generator = torch.Generator(device).manual_seed(int(seed))
    return torch.empty(rows, columns, dtype=torch.bool, device=device).bernoulli_(
        1 - dropout_p, generator=generator
    )


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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of S, dS and of accumulation beside an x of dtype: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [M, N] in x's dtype and S [M, r] in wide_dtype, scale included; only y is rounded to x's dtype."""
    wide = wide_dtype(x.dtype)
    wide_x = x.to(wide)
    dropped = wide_x
    if dropout_p:
        dropped = wide_x * keep_mask(seed, *x.shape, dropout_p, x.device) / (1 - dropout_p)
    s = scale * linear(dropped, lora_a.to(wide))
    frozen = linear(wide_x, weight.to(wide), None if bias is None else bias.to(wide))
    return (frozen + linear(s, lora_b.to(wide))).to(x.dtype), s


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters' dtype; None where needs says so."""
    need_x, need_a, need_b = needs
    wide = wide_dtype(x.dtype)
    wide_dy = dy.to(wide)
    multiplier = 1.0
    if dropout_p:
        multiplier = keep_mask(seed, *x.shape, dropout_p, x.device).to(wide) / (1 - dropout_p)
    ds = scale * (wide_dy @ lora_b.to(wide))
    dx = da = db = None
    if need_x:
        dx = (wide_dy @ weight.to(wide) + (ds @ lora_a.to(wide)) * multiplier).to(x.dtype)
    if need_a:
        da = (ds.T @ (x.to(wide) * multiplier)).to(lora_a.dtype)
    if need_b:
        db = (wide_dy.T @ s).to(lora_b.dtype)
    return dx, da, db
