"""What every implementation of the LoRA linear is given."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

Direction = Literal["forward", "backward"]
# Bytes: rows have to begin at multiples of it for a thread's widest load and the tensor memory accelerator.
ALIGNMENT = 16
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
# Whether x, lora_a and lora_b need a gradient, and these: None where they do not.
Needs = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


# not frozen: every forward and backward makes one, and a frozen one takes five times as long to make
@dataclass(slots=True, eq=False)
class Problem:
    """One LoRA linear: y = x·Wᵀ + b + scale·(drop(x)·Aᵀ)·Bᵀ.

    Implementations are pairs of functions, and any forward goes with any backward: ``forward(problem)``
    returns y [M, N] in x's dtype and S = scale·drop(x)·Aᵀ [M, r] in `accumulation_dtype`; ``backward(problem,
    dy, s, needs)`` returns, for dy [M, N], dx [M, K] in x's dtype, dA [r, K] and dB [N, r] in the adapters'
    dtype, each None where needs says so.

    Attributes:
        x: [M, K].
        weight: [N, K] in x's dtype, in either storage order.
        bias: [N] in x's dtype, or None.
        lora_a: [r, K] in x's dtype or `accumulation_dtype`.
        lora_b: [N, r] in lora_a's dtype.
        scale: multiplies B·A.
        dropout_p: probability in [0, 1).
        seed: int64 [1], the dropout mask (see `keep_mask`); [0] where dropout_p is 0.
        s: S of this very x and seed where it is known, which forward then returns; None where it computes it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout_p: float
    seed: Tensor
    s: Tensor | None = field(default=None, kw_only=True)
