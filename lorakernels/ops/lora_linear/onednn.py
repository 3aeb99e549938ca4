"""The float32 LoRA linear on oneDNN's GEMM, which also makes the thin products faster than BLAS does.

It cannot add to what is there, so the update is added to its result, in place, by BLAS: as many bytes as an
addend read by the GEMM. Signatures and shapes are those of reference.py.
"""

from torch import Tensor

from lorakernels.cpu_gemm import ONEDNN
from lorakernels.ops.lora_linear import aten

product = ONEDNN.backward  # of a [M, K] and b [K, r]


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
    """y [M, N] and S [M, r], scale included."""
    s = aten.shrink(x, lora_a, scale, dropout_p, seed, product)
    return ONEDNN.forward(x, weight, bias).addmm_(s, lora_b.T), s


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
    """dx [M, K], dA [r, K] and dB [N, r]; None where needs says so."""
    ds, keep, da, db = aten.thin_gradients(
        dy, x, lora_a, lora_b, s, scale, dropout_p, seed, needs, product, product_over_rows
    )
    dx = None
    if needs[0]:
        dx = product(dy, weight)
        dx = dx.addmm_(ds, lora_a) if keep is None else dx.add_((ds @ lora_a).mul_(keep))
    return dx, da, db


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ [K, M] times b [M, r], the few rows of bᵀ on the left: the other order takes five times as long."""
    return product(b.T, a).T
