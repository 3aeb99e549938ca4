"""The frozen linear layer, alone or after GELU: nothing is saved for the backward pass that it does not need.

On a CPU the products are those of `cpu_gemm.fastest`, and GELU is fused: a block of rows of gelu(x) is
made, multiplied while it is in cache, and dropped; the backward pass multiplies a block of its gradient with
the derivative in the same way. So gelu(x) never exists as a whole.

On a GPU the layer after GELU is an operator for the sake of its gradient, of which there are several
`implementations`: one product whose result is multiplied by the derivative before it is stored, or two steps.
"""

import torch
from torch.nn.functional import gelu as torch_gelu
from torch.nn.functional import linear

from lorakernels import cpu_gemm, dispatch
from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.autograd import differentiable_once
from lorakernels.ops.frozen_linear import aten
from lorakernels.ops.frozen_linear.implementations import select
from lorakernels.ops.frozen_linear.reference import Problem

# of gelu(x) at a time: stays in the cache, and long enough for full GEMM speed at BLOOM's widths
BLOCK_BYTES = 4 * 2**20


def frozen_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """``F.linear`` of x, or of gelu(x), for a weight that is not trained; of x it saves what gelu needs.

    x [..., K], weight [N, K], bias [N] or None, of one floating dtype; returns [..., N] of that dtype. gelu
    is the tanh form, 0.5·x·(1 + tanh(sqrt(2/π)·(x + 0.044715·x³))), of Hendrycks and Gimpel (2016,
    arXiv:1606.08415). Under autocast x, weight and bias are cast to its dtype first. On a CPU small products
    are `F.linear`'s; of others the faster library multiplies, and where it multiplies float32 faster than the
    weight's 16 bits, the weight is cast block by block. On a GPU the products are `F.linear`'s; the gradient
    through GELU is the faster of several implementations, which LORAKERNELS_BACKEND forces.

    Raises ValueError if weight or bias requires a gradient or the shapes do not fit, TypeError on mixed
    dtypes.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: expected [N, K] for x [..., K] {list(x.shape)}, got {list(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one with requires_grad=True")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {[len(weight)]}, got {list(bias.shape)}")
    if not _is_operator(x, weight, gelu):
        x_rows = x.reshape(x.shape[:-1].numel(), weight.shape[1])
        out = aten.forward(x_rows, weight, bias) if gelu else linear(x_rows, weight, bias)
        return _unflattened(out, x)
    return _forward(_Saved.apply(x, weight, gelu), x.detach(), weight, bias, gelu)


def _is_operator(x: torch.Tensor, weight: torch.Tensor, gelu: bool) -> bool:
    """Whether torch's own operations do not do: on a CPU for large products, on a GPU for GELU's gradient."""
    if x.is_cuda:
        return gelu and x.requires_grad and torch.is_grad_enabled()
    return x.is_cpu and x.dtype != torch.float64 and dispatch.is_large(x.shape[:-1].numel(), weight)


class _Saved(torch.autograd.Function):
    """Save what the gradient needs, and return a tensor of the result's shape that stands for it in autograd.

    That tensor has no values. Autograd saves a function's tensors when its forward returns; here that is
    before the layer computes anything. Checkpointing stops its recomputation as soon as everything is saved
    again, and so computes neither GELU nor the product a second time.
    """

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, gelu: bool) -> torch.Tensor:
        return x.new_empty(1).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, gelu = inputs
        ctx.save_for_backward(weight, *([x] if gelu else []))

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        weight, *x = ctx.saved_tensors
        return _backward(dy, weight, x[0] if x else None), None, None


@torch.library.custom_op("lorakernels::frozen_linear", mutates_args=(), device_types=("cpu", "cuda"))
@without_autocast
def _forward(
    saved: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """The result, whose gradient is that of saved, a tensor of its shape."""
    rows = x.reshape(x.shape[:-1].numel(), weight.shape[1])
    if x.is_cuda:
        return _unflattened(aten.forward(rows, weight, bias), x)
    gemm = cpu_gemm.fastest(weight.dtype)
    if not gelu:
        out = gemm.forward(rows, weight, bias)
    else:
        out = rows.new_empty(len(rows), len(weight))
        size = _block_rows(rows)
        for part, block in zip(out.split(size), rows.split(size), strict=True):
            part.copy_(gemm.forward(torch_gelu(block, approximate="tanh"), weight, bias))
    return _unflattened(out, x)


def _unflattened(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out [rows, N] in the shape that x [..., K] has before its last dimension, and not as a view.

    Callers may add to it in place: of a view, autograd would copy the whole gradient four times for that.
    """
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[1]])


@torch.library.custom_op("lorakernels::frozen_linear_backward", mutates_args=(), device_types=("cpu", "cuda"))
@without_autocast
def _backward(dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
    """The gradient of x; x is given where the layer had a GELU."""
    count, (n, k) = dy.shape[:-1].numel(), weight.shape
    rows = dy.reshape(count, n)
    if x is not None and x.is_cuda:
        problem = Problem(rows, weight, x.reshape(count, k))
        dx = select(problem).backward(*problem)
    elif x is None:
        dx = cpu_gemm.fastest(weight.dtype).backward(rows, weight)
    else:
        gemm, x_rows = cpu_gemm.fastest(weight.dtype), x.reshape(count, k)
        dx = torch.empty_like(x_rows)
        size = _block_rows(x_rows)
        for part, block, before in zip(dx.split(size), rows.split(size), x_rows.split(size), strict=True):
            torch.ops.aten.gelu_backward.grad_input(
                gemm.backward(block, weight), before, approximate="tanh", grad_input=part
            )
    return dx.view(*dy.shape[:-1], weight.shape[1])


def _block_rows(x: torch.Tensor) -> int:
    # a weight that is cast is cast once for each block: one block then
    if cpu_gemm.widens(x.dtype):
        return max(1, len(x))
    return max(1, BLOCK_BYTES // (x.element_size() * max(1, x.shape[1])))


@_forward.register_fake
def _(saved, x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_backward.register_fake
def _(dy, weight, x):
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


_forward.register_autograd(lambda ctx, dy: (dy, None, None, None, None))
_backward.register_autograd(differentiable_once("frozen_linear"))
