"""The float32 LoRA linear on oneDNN's GEMM, which also makes the thin products faster than BLAS does.

It cannot add to what is there, so the update is added to its result, in place, by BLAS: as many bytes as an
addend read by the GEMM. Shapes are those of `Problem`.
"""

from torch import Tensor

from lorakernels.cpu_gemm import ONEDNN
from lorakernels.ops.lora_linear import aten
from lorakernels.ops.lora_linear.problem import Gradients, Needs, Problem

product = ONEDNN.backward  # of a [M, K] and b [K, r]


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """y [M, N] and S [M, r], scale included."""
    s = aten.shrink(problem, product)
    y = ONEDNN.forward(problem.x, problem.weight, problem.bias)
    return y.addmm_(s, problem.lora_b.T), s


def backward(problem: Problem, dy: Tensor, s: Tensor, needs: Needs) -> Gradients:
    """dx [M, K], dA [r, K] and dB [N, r]; None where needs says so."""
    ds, keep, da, db = aten.thin_gradients(problem, dy, s, needs, product, product_over_rows)
    if ds is None or not needs[0]:
        return None, da, db
    dx, lora_a = product(dy, problem.weight), problem.lora_a
    dx = dx.addmm_(ds, lora_a) if keep is None else dx.add_((ds @ lora_a).mul_(keep))
    return dx, da, db


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ [K, M] times b [M, r], the few rows of bᵀ on the left: the other order takes five times as long."""
    return product(b.T, a).T
