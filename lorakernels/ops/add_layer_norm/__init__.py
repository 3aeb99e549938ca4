"""A residual addition with the layer norm of the sum, and the gradient through both: two operators.

On a GPU each is one kernel, which reads and writes every tensor once.
"""

import torch
from torch import Tensor

from lorakernels.ops.add_layer_norm.implementations import select
from lorakernels.ops.add_layer_norm.reference import BackwardProblem, Problem
from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.autograd import differentiable_once
from lorakernels.ops.lora_linear import check_backend
from lorakernels.tolerance import accumulation_dtype

__all__ = ["add_layer_norm"]

BACKENDS = ("auto", "reference", "aten", "triton")


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``t = x + residual`` and a frozen layer norm of t (Ba et al. 2016, arXiv:1607.06450).

    The sum is rounded to x's dtype before it is normalised. The two gradients that come back, of t and of the
    layer norm, make one gradient, of x and of residual alike; a kernel adds them in float32 and rounds once.

    Args:
        x: [..., K], K >= 1, float16, bfloat16, float32 or float64.
        residual: of x's shape and dtype.
        weight: [K] in x's dtype, frozen.
        bias: [K] in x's dtype, frozen.
        eps: added to the variance, at least 0.
        backend: "auto" takes what was measured to be faster on a GPU, and torch's operations elsewhere; the
            others force one. "triton" needs a GPU, or CPU tensors under TRITON_INTERPRET=1, and leaves rows
            of more than 32 KiB to torch.

    Returns:
        t and layer_norm(t), both [..., K] in x's dtype (under autocast in autocast's), differentiable once.

    Raises:
        ValueError: a shape, device, eps or backend that does not fit, or a weight or bias that asks for a
            gradient. TypeError: a dtype that does not fit.
    """
    x, residual, weight, bias = cast_for_autocast(x, residual, weight, bias)
    check_norm(x, {"weight": weight, "bias": bias}, eps)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected x's shape {list(x.shape)}, got {list(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual: expected x's device {x.device}, got {residual.device}")
    check_backend(backend, BACKENDS)
    t, h, _, _ = _forward_op(x, residual, weight, bias, float(eps), backend)
    return t, h


def check_norm(x: Tensor, parameters: dict[str, Tensor], eps: float) -> None:
    """Raise ValueError or TypeError where a frozen layer norm of x with these parameters cannot be."""
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape [..., K] with K >= 1, got {list(x.shape)}")
    k = x.shape[-1]
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, tensor in parameters.items():
        if list(tensor.shape) != [k]:
            raise ValueError(f"{name}: expected shape {[k]}, got {list(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one with requires_grad=True")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


@torch.library.custom_op("lorakernels::add_layer_norm", mutates_args=())
@without_autocast
def _forward_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, residual_rows = (one.reshape(-1, x.shape[-1]) for one in (x, residual))
    problem = Problem(rows, residual_rows, weight, bias, eps)
    t, h, mean, rstd = select(problem, backend).forward(problem)
    # not views, so that callers may change them in place
    t, h = (torch.ops.aten._unsafe_view(one, x.shape) for one in (t, h))
    statistics = [*x.shape[:-1], 1]
    return t, h, mean.view(statistics), rstd.view(statistics)


@_forward_op.register_fake
def _(x, residual, weight, bias, eps, backend):
    t, h = (x.new_empty(x.shape) for _ in range(2))
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return t, h, mean, rstd


@torch.library.custom_op("lorakernels::add_layer_norm_backward", mutates_args=())
@without_autocast
def _backward_op(
    dh: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dt: Tensor | None, backend: str
) -> Tensor:
    k = x.shape[-1]
    dh, x_rows, mean, rstd = (one.reshape(-1, one.shape[-1]) for one in (dh, x, mean, rstd))
    problem = BackwardProblem(dh, x_rows, weight, mean, rstd, None if dt is None else dt.reshape(-1, k))
    dx = select(problem, backend).backward(problem)
    return torch.ops.aten._unsafe_view(dx, x.shape)


@_backward_op.register_fake
def _(dh, x, weight, mean, rstd, dt, backend):
    return x.new_empty(x.shape)


def input_gradient(
    dh: Tensor | None,
    dt: Tensor | None,
    backend: str,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor | None:
    """dx [..., K] of a frozen layer norm h of x, plus dt; dh and dt are None where there is no gradient."""
    return dt if dh is None else _backward_op(dh, x, weight, mean, rstd, dt, backend)


def _setup_context(ctx, inputs, output) -> None:
    _, _, weight, _, _, ctx.backend = inputs
    t, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(t, weight, mean, rstd)


def _backward(ctx, dt, dh, *_without_gradient):
    dx = input_gradient(dh, dt, ctx.backend, *ctx.saved_tensors)
    return *(dx if need else None for need in ctx.needs_input_grad[:2]), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(differentiable_once("add_layer_norm"))
