"""The LoRA linear as others do it, each a function of x alone that autograd differentiates."""

from collections.abc import Callable

import loralib
import peft
import torch
from torch import Tensor, nn

from lorakernels import frozen_linear
from lorakernels.ops.lora_linear.check import Case
from lorakernels.ops.lora_linear.reference import plain_lora_linear

Layer = tuple[Callable[[Tensor], Tensor], list[Tensor]]


def frozen(problem: Case) -> Layer:
    """The frozen linear alone, by the fastest product that this project has: the floor."""
    return (lambda x: frozen_linear(x, problem.weight, problem.bias)), []


def torch_frozen(problem: Case) -> Layer:
    """The frozen linear alone, as torch multiplies."""
    return (lambda x: nn.functional.linear(x, problem.weight, problem.bias)), []


def plain(problem: Case) -> Layer:
    """The textbook expression."""
    lora_a, lora_b = _leaves(problem)
    return (lambda x: plain_lora_linear(x, problem.weight, problem.bias, lora_a, lora_b, problem.scale)), [
        lora_a,
        lora_b,
    ]


def peft_linear(problem: Case, *, upcast_adapters: bool = True, compiled: bool = False) -> Layer:
    """PEFT's LoRA layer; upcast_adapters is its default, adapters in float32."""
    (n, k), rank = problem.weight.shape, problem.lora_a.shape[0]
    base = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
    base.weight = nn.Parameter(problem.weight)
    if problem.bias is not None:
        base.bias = nn.Parameter(problem.bias)
    config = peft.LoraConfig(r=rank, lora_alpha=problem.scale * rank, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=upcast_adapters)
    layer = model.base_model.model[0]
    adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        for own, given in zip(adapters, (problem.lora_a, problem.lora_b), strict=True):
            own.copy_(given)
    return (torch.compile(layer) if compiled else layer), adapters


def peft_without_upcast(problem: Case) -> Layer:
    """PEFT with autocast_adapter_dtype=False: adapters in the base's dtype."""
    return peft_linear(problem, upcast_adapters=False)


def peft_compiled(problem: Case) -> Layer:
    """PEFT under torch.compile."""
    return peft_linear(problem, compiled=True)


def loralib_linear(problem: Case) -> Layer:
    """loralib's layer, whose adapters have the base's dtype."""
    (n, k), rank = problem.weight.shape, problem.lora_a.shape[0]
    layer = loralib.Linear(
        k, n, r=rank, lora_alpha=problem.scale * rank, merge_weights=False, bias=problem.bias is not None
    ).to(problem.weight)
    with torch.no_grad():
        layer.lora_A.copy_(problem.lora_a)
        layer.lora_B.copy_(problem.lora_b)
    layer.weight.data = problem.weight
    if problem.bias is not None:
        layer.bias.requires_grad_(False).data = problem.bias
    return layer, [layer.lora_A, layer.lora_B]


class _InPlace(torch.autograd.Function):
    """The vendor's GEMM, then addmm into the same memory, forward and backward; dy·B is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale):
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        y = nn.functional.linear(x, weight, bias)
        return y.addmm_(x @ lora_a.T.to(x.dtype), lora_b.T.to(x.dtype), alpha=scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        dx = (dy @ weight).addmm_(dy @ b, a, alpha=ctx.scale)
        da = ((dy @ b).T @ x).mul_(ctx.scale).to(lora_a.dtype)
        db = (dy.T @ (x @ a.T)).mul_(ctx.scale).to(lora_b.dtype)
        return dx, None, None, da, db, None


def in_place(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """x [..., K] to [..., N] by `addmm_in_place`'s method, for a layer within a model."""
    y = _InPlace.apply(x.flatten(0, -2), weight, bias, lora_a, lora_b, scale)
    return y.unflatten(0, x.shape[:-1])


def addmm_in_place(problem: Case) -> Layer:
    """The unfused fast path of LoRA libraries without their own GEMM; unsloth has this form, which
    is re-implemented here since the package itself runs on a GPU only."""
    lora_a, lora_b = _leaves(problem)
    return (lambda x: _InPlace.apply(x, problem.weight, problem.bias, lora_a, lora_b, problem.scale)), [
        lora_a,
        lora_b,
    ]


def _leaves(problem: Case) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in (problem.lora_a, problem.lora_b)]
