"""The float32 LoRA linear on oneDNN's GEMM, which also makes the thin products faster than BLAS does.

It cannot add to what is there, so the update is added to its result, in place, by BLAS: as many bytes as an
addend read by the GEMM. Signatures and shapes are those of reference.py.
"""

from torch import Tensor

from lorakernels.cpu_gemm import ONEDNN
from lorakernels.ops.lora_linear.reference import keep_mask

product = ONEDNN.forward


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
    dropped = x * keep_mask(seed, *x.shape, dropout_p, x.device) if dropout_p else x
    s = product(dropped, lora_a, None).mul_(scale / (1 - dropout_p))
    return product(x, weight, bias).addmm_(s, lora_b.T), s


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
    need_x, need_a, need_b = needs
    dx = da = db = None
    if need_x or need_a:
        ds = product(dy, lora_b.T, None).mul_(scale / (1 - dropout_p))
        keep = keep_mask(seed, *x.shape, dropout_p, x.device) if dropout_p else None
    if need_a:
        da = product(ds.T, (x if keep is None else x * keep).T, None)
    if need_b:
        db = product(s.T, dy.T, None).T
    if need_x:
        dx = product(dy, weight.T, None)
        dx = dx.addmm_(ds, lora_a) if keep is None else dx.add_((ds @ lora_a).mul_(keep))
    return dx, da, db
