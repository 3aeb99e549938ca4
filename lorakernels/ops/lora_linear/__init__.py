"""The LoRA linear: y = x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ over a frozen W and b, as one differentiable operator.

The public function checks its arguments and calls a torch.library operator, which torch.compile, autocast and
activation checkpointing treat like one of torch's own. For the backward it keeps x, the thin
S = s·drop(x)·Aᵀ, the dropout seed and references to the parameters: no dropped copy of x, no mask, no output.
"""

import math

import torch
from torch import Tensor

from lorakernels.ops.autocast import cast_for_autocast, without_autocast
from lorakernels.ops.autograd import differentiable_once
from lorakernels.ops.lora_linear.implementations import select
from lorakernels.ops.lora_linear.problem import Problem
from lorakernels.tolerance import accumulation_dtype

BACKENDS = ("auto", "reference", "aten", "onednn", "triton")


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str = "auto",
    shrunk: tuple[Tensor, Tensor] | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer with a trainable low-rank update (LoRA, arXiv:2106.09685, section 4.1).

    Args:
        x: [..., K], float16, bfloat16, float32 or float64.
        weight: [N, K] in x's dtype, frozen, in either storage order.
        bias: [N] in x's dtype, frozen, or None.
        lora_a: [r, K], r >= 1, in x's dtype or float32.
        lora_b: [N, r] in lora_a's dtype.
        scale: multiplies B·A directly (PEFT's lora_alpha / r); finite.
        dropout_p: probability in [0, 1) with which the update's input elements are dropped, the rest scaled
            by 1 / (1 - p). The mask is the same in every backend and follows seed, or torch.manual_seed.
        training: False turns dropout off.
        backend: "auto" takes what was measured to be fastest here; the others force one. "triton" needs
            a GPU, or CPU tensors under TRITON_INTERPRET=1.
        shrunk: S and the dropout seed that `layer_norm_shrink` returned beside this very x for the same
            lora_a, scale and dropout; None computes them. S is taken as it is, and all gradients are those of
            S as a function of x and lora_a.
        seed: int64 [1] on x's device, which fixes the mask (see `reference.keep_mask`); unused without
            dropout. None draws one from torch's generator.

    Returns:
        x @ weight.T + bias + scale * (dropout(x) @ lora_a.T) @ lora_b.T, shape [..., N], in x's dtype; under
        autocast in autocast's dtype. Differentiable once in x, lora_a and lora_b.

    Raises:
        ValueError: a shape, device, probability, scale or backend that does not fit, a weight, bias or S
            that asks for a gradient, or a seed beside shrunk. TypeError: a dtype that does not fit.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    # float32 adapters stay: the operator widens them exactly where 16 bits would lose their update
    if lora_a.dtype != torch.float32:
        lora_a, lora_b = cast_for_autocast(lora_a, lora_b)
    _check_tensors(x, weight, bias, lora_a, lora_b)
    check_options(scale, dropout_p, backend, BACKENDS)
    p = float(dropout_p) if training else 0.0
    s = None
    if shrunk is not None:
        if seed is not None:
            raise ValueError("seed: expected None beside shrunk, which holds one already")
        s, seed = shrunk
        _check_shrunk(s, seed, x, lora_a, p)
    else:
        seed = given_seed(seed, p, x.device)
    y, _, _ = _forward_op(x, weight, bias, lora_a, lora_b, float(scale), p, backend, s, seed)
    return y


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    if x.ndim < 1:
        raise ValueError("x: expected shape [..., K], got a tensor without dimensions")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape [N, {x.shape[-1]}] for x {_shape(x)}, got {_shape(weight)}")
    n, k = weight.shape
    if lora_a.ndim != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a: expected shape [r, {k}] with r >= 1, got {_shape(lora_a)}")
    expected_b = [n, lora_a.shape[0]]
    if list(lora_b.shape) != expected_b:
        raise ValueError(f"lora_b: expected shape {expected_b}, got {_shape(lora_b)}")
    if bias is not None and list(bias.shape) != [n]:
        raise ValueError(f"bias: expected shape {[n]}, got {_shape(bias)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one with requires_grad=True")
    wider = accumulation_dtype(x.dtype)
    if lora_a.dtype not in (x.dtype, wider):
        raise TypeError(f"lora_a: expected {x.dtype} or {wider}, got {lora_a.dtype}")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: expected lora_a's dtype {lora_a.dtype}, got {lora_b.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def _check_shrunk(s: Tensor, seed: Tensor, x: Tensor, lora_a: Tensor, dropout_p: float) -> None:
    expected = [math.prod(x.shape[:-1]), lora_a.shape[0]]
    if list(s.shape) != expected:
        raise ValueError(f"shrunk: expected S of shape {expected}, got {_shape(s)}")
    if list(seed.shape) != [*seed_shape(dropout_p)]:
        raise ValueError(
            f"shrunk: expected a seed of shape {[*seed_shape(dropout_p)]} for dropout {dropout_p}, "
            f"got {_shape(seed)}"
        )
    for name, tensor, dtype in (("S", s, accumulation_dtype(x.dtype)), ("a seed", seed, torch.int64)):
        if tensor.dtype != dtype:
            raise TypeError(f"shrunk: expected {name} in {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"shrunk: expected {name} on x's device {x.device}, got {tensor.device}")
    if s.requires_grad:
        raise ValueError("shrunk: expected S without a gradient, got one with requires_grad=True")


def given_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """seed where dropout uses it, else None; raises ValueError or TypeError where it does not fit."""
    if seed is None:
        return None
    if list(seed.shape) != [1]:
        raise ValueError(f"seed: expected shape [1], got {_shape(seed)}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: expected torch.int64, got {seed.dtype}")
    if seed.device != device:
        raise ValueError(f"seed: expected x's device {device}, got {seed.device}")
    return seed if dropout_p else None


def check_options(scale: float, dropout_p: float, backend: str, backends: tuple[str, ...]) -> None:
    """Raise ValueError for a scale, a dropout or a backend that no operator with dropout takes."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    check_backend(backend, backends)


def check_backend(backend: str, backends: tuple[str, ...]) -> None:
    """Raise ValueError for a backend that is none of those that the operator takes."""
    if backend not in backends:
        raise ValueError(f"backend: expected one of {', '.join(backends)}, got {backend!r}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


# Tagged, or torch.compile with non-reentrant checkpointing would replay the forward under another mask, in
# silence.
@torch.library.custom_op(
    "lorakernels::lora_linear_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
@without_autocast
def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    backend: str,
    s: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    drawn = draw_seed(x, dropout_p) if seed is None else seed
    rows = x.reshape(-1, x.shape[-1])
    problem = Problem(rows, weight, bias, lora_a, lora_b, scale, dropout_p, drawn, s=s)
    y, made = select(problem, backend, "forward").forward(problem)
    # not a view, so that callers may add to y in place
    y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    # an operator may not return what it was given: empty tensors stand for that
    return y, x.new_empty(0) if s is not None else made, drawn if seed is None else seed.new_empty(0)


@_forward_op.register_fake
def _(x, weight, bias, lora_a, lora_b, scale, dropout_p, backend, s=None, seed=None):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    made = x.new_empty(0)
    if s is None:
        made = x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0], dtype=accumulation_dtype(x.dtype))
    return y, made, x.new_empty(seed_shape(dropout_p) if seed is None else 0, dtype=torch.int64)


def seed_shape(dropout_p: float) -> tuple[int]:
    """The shape of a dropout seed: one number, none where nothing is dropped."""
    return (1 if dropout_p else 0,)


def draw_seed(x: Tensor, dropout_p: float) -> Tensor:
    """A dropout seed on x's device, int64 `seed_shape`, from torch's generator there."""
    seed = x.new_empty(seed_shape(dropout_p), dtype=torch.int64)
    return seed.random_() if dropout_p else seed


@torch.library.custom_op("lorakernels::lora_linear_backward", mutates_args=())
@without_autocast
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    seed: Tensor,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    dy_rows = dy.reshape(-1, dy.shape[-1])
    problem = Problem(rows, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    chosen = select(problem, backend, "backward")
    dx, da, db = chosen.backward(problem, dy_rows, s, tuple(needs))
    # an operator returns tensors, never None: an empty one stands for a gradient that was not asked for
    return (
        x.new_empty(0) if dx is None else dx.view(x.shape),
        lora_a.new_empty(0) if da is None else da.contiguous(),
        lora_b.new_empty(0) if db is None else db.contiguous(),
    )


@_backward_op.register_fake
def _(dy, x, weight, bias, lora_a, lora_b, s, seed, scale, dropout_p, backend, needs):
    wanted = zip((x, lora_a, lora_b), needs, strict=True)
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in wanted)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, lora_a, lora_b, ctx.scale, ctx.dropout_p, ctx.backend, s, seed = inputs
    # callers do not get what was made: it needs no gradients, and no zeros in their place
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    s, seed = (made if given is None else given for given, made in zip((s, seed), output[1:], strict=True))
    ctx.save_for_backward(x, weight, bias, lora_a, lora_b, s, seed)


def _backward(ctx, dy, _ds, _dseed):
    x, weight, bias, lora_a, lora_b, s, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
    grads = _backward_op(
        dy, x, weight, bias, lora_a, lora_b, s, seed, ctx.scale, ctx.dropout_p, ctx.backend, needs
    )
    dx, da, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, None, None, da, db, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(differentiable_once("lora_linear"))
