"""A layer norm and the shrink of the LoRA linear after it, S = scale·drop(h)·Aᵀ, as one operator.

On a GPU one kernel makes both, in the time of the layer norm alone. The operator is differentiable in x
through h; S is not: `lora_linear`, which is given both, accounts for S in its own gradients. The backward
pass is `add_layer_norm`'s, and adds the gradient of a residual connection that begins at x.
"""

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lorakernels.ops.add_layer_norm import BACKENDS, check_norm, input_gradient
from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.layer_norm_shrink.implementations import select
from lorakernels.ops.layer_norm_shrink.reference import Problem
from lorakernels.ops.lora_linear import check_options, draw_seed, given_seed, seed_shape
from lorakernels.tolerance import accumulation_dtype

__all__ = ["layer_norm_shrink"]


def layer_norm_shrink(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    lora_a: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    seed: Tensor | None = None,
    return_x: bool = False,
) -> tuple[Tensor, ...]:
    """A frozen layer norm (Ba et al. 2016, arXiv:1607.06450) and what a LoRA linear after it begins with.

    ``h, s, seed = layer_norm_shrink(x, ...)`` and ``lora_linear(h, ..., shrunk=(s, seed))`` with the same
    lora_a, scale and dropout have the values and gradients of the layer norm and of ``lora_linear(h, ...)``.

    Args:
        x: [..., K], K >= 1, float16, bfloat16, float32 or float64.
        norm_weight: [K] in x's dtype, frozen.
        norm_bias: [K] in x's dtype, frozen.
        eps: added to the variance, at least 0.
        lora_a: [r, K], r >= 1, in x's dtype or float32. It gets no gradient from here.
        scale: multiplies B·A directly (PEFT's lora_alpha / r); finite.
        dropout_p: probability in [0, 1) with which an element of h is dropped in S, the rest scaled by
            1 / (1 - p). The mask is that of lora_linear for the returned seed, which is seed or follows
            torch.manual_seed.
        training: False turns dropout off.
        backend: "auto" takes what was measured to be faster on a GPU, and torch's operations elsewhere; the
            others force one. "triton" needs a GPU, or CPU tensors under TRITON_INTERPRET=1, and leaves ranks
            above 128 to torch.
        seed: as in `lora_linear`.
        return_x: return x too, for a residual connection to begin at: the gradient that comes back through
            it is added to that of the layer norm in float32, by one kernel.
            Under autocast or torch.compile it is the given x itself.

    Returns:
        h [..., K], the layer norm in x's dtype (under autocast in autocast's), differentiable in x; S [M, r],
        scale * dropout(h) @ lora_a.T of h's M rows in float32 (float64 for float64), made of h as it
        is returned; the dropout's seed, int64 [1], or [0] without dropout; with return_x also x, a view that
        must not be changed in place. S and seed have no gradient. Differentiable once.

    Raises:
        ValueError: a shape, device, eps, probability, scale or backend that does not fit, or a norm_weight or
            norm_bias that asks for a gradient. TypeError: a dtype that does not fit.
    """
    given = x
    x, norm_weight, norm_bias = cast_for_autocast(x, norm_weight, norm_bias)
    if lora_a.dtype != torch.float32:
        (lora_a,) = cast_for_autocast(lora_a)
    check_norm(x, {"norm_weight": norm_weight, "norm_bias": norm_bias}, eps)
    _check_factor(lora_a, x)
    check_options(scale, dropout_p, backend, BACKENDS)
    p = float(dropout_p) if training else 0.0
    seed = given_seed(seed, p, x.device)
    # detached, or h would ask for a gradient wherever lora_a does
    arguments = (x, norm_weight, norm_bias, float(eps), lora_a.detach(), float(scale), p, backend, seed)
    if return_x and x is given and not is_compiling():
        given, h, s, drawn, _, _ = _WithInput.apply(*arguments)
    else:
        h, s, drawn, _, _ = _forward_op(*arguments)
    seed = drawn if seed is None else seed
    return (h, s, seed, given) if return_x else (h, s, seed)


def _check_factor(lora_a: Tensor, x: Tensor) -> None:
    k = x.shape[-1]
    if lora_a.ndim != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: expected shape [r, {k}] with r >= 1, got {list(lora_a.shape)}")
    wider = accumulation_dtype(x.dtype)
    if lora_a.dtype not in (x.dtype, wider):
        raise TypeError(f"lora_a: expected {x.dtype} or {wider}, got {lora_a.dtype}")
    if lora_a.device != x.device:
        raise ValueError(f"lora_a: expected x's device {x.device}, got {lora_a.device}")


# tagged as lora_linear's forward is, since it draws the seed
@torch.library.custom_op(
    "lorakernels::layer_norm_shrink", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
@without_autocast
def _forward_op(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    lora_a: Tensor,
    scale: float,
    dropout_p: float,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    drawn = draw_seed(x, dropout_p) if seed is None else seed
    rows = x.reshape(-1, x.shape[-1])
    problem = Problem(rows, norm_weight, norm_bias, eps, lora_a, scale, dropout_p, drawn)
    h, s, mean, rstd = select(problem, backend).forward(problem)
    # not a view, so that callers may change h in place
    h = torch.ops.aten._unsafe_view(h, x.shape)
    statistics = [*x.shape[:-1], 1]
    # an operator may not return what it was given: an empty tensor stands for that
    drawn = drawn if seed is None else seed.new_empty(0)
    return h, s.contiguous(), drawn, mean.view(statistics), rstd.view(statistics)


@_forward_op.register_fake
def _(x, norm_weight, norm_bias, eps, lora_a, scale, dropout_p, backend, seed=None):
    wide = accumulation_dtype(x.dtype)
    s = x.new_empty(x.shape[:-1].numel(), lora_a.shape[0], dtype=wide)
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=wide) for _ in range(2))
    drawn = x.new_empty(seed_shape(dropout_p) if seed is None else 0, dtype=torch.int64)
    return x.new_empty(x.shape), s, drawn, mean, rstd


def _setup_context(ctx, inputs, output) -> None:
    x, norm_weight, *_ = inputs
    ctx.backend = inputs[7]
    *_, s, seed, mean, rstd = output
    ctx.mark_non_differentiable(s, seed, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, norm_weight, mean, rstd)


def _backward(ctx, dh, *_without_gradient):
    return _gradients(ctx, dh, None)


def _gradients(ctx, dh: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
    """For the gradients of h and of x beside it, None for none, those of the operator's arguments."""
    return input_gradient(dh, dx, ctx.backend, *ctx.saved_tensors), *[None] * 8


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _WithInput(torch.autograd.Function):
    """x and what the operator makes of it: an operator of torch.library may not return what it is given."""

    @staticmethod
    def forward(x: Tensor, *others):
        return x.view_as(x), *_forward_op(x, *others)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, dx, dh, *_without_gradient):
        return _gradients(ctx, dh, dx)
