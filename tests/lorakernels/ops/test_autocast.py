"""Autocast and every operator: arguments are cast on entry, and the products inside are left as they are."""

import contextlib

import pytest
import torch

from lorakernels import (
    add_layer_norm,
    alibi_attention,
    alibi_slopes,
    cpu_gemm,
    frozen_linear,
    layer_norm_shrink,
    linear_cross_entropy,
    lora_linear,
)
from lorakernels.ops.autocast import cast_for_autocast


def tensors(device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (24, 32), "weight": (300, 32), "bias": (300,), "lora_a": (4, 32), "lora_b": (300, 4)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made = {name: tensor.to(device, dtype) for name, tensor in made.items()}
    return made | {"labels": torch.randint(300, (24,), generator=generator).to(device)}


def lora(x, weight, bias, lora_a, lora_b, labels):
    return lora_linear(x, weight.detach(), bias, lora_a, lora_b, 2.0)


def normed_lora(x, weight, bias, lora_a, lora_b, labels):
    h, *shrunk = layer_norm_shrink(x, weight[0].detach(), weight[1].detach(), 1e-5, lora_a, 2.0)
    return lora_linear(h, weight.detach(), bias, lora_a, lora_b, 2.0, shrunk=tuple(shrunk))


def added_norm(x, weight, bias, lora_a, lora_b, labels):
    parameters = weight[0].detach(), weight[1].detach()
    t, h = add_layer_norm(x, weight[2:26], *parameters, 1e-5)
    return t + 2 * h


def frozen(x, weight, bias, lora_a, lora_b, labels):
    return frozen_linear(x, weight.detach(), bias, gelu=True)


def loss(x, weight, bias, lora_a, lora_b, labels):
    return linear_cross_entropy(x, weight, labels, reduction="none")


def heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[24, 32] each as [1, 4, 24, 8]."""
    return [tensor.view(1, 24, 4, 8).transpose(1, 2) for tensor in tensors]


def attention(x, weight, bias, lora_a, lora_b, labels):
    return alibi_attention(*heads(x, weight[:24], weight[24:48]), alibi_slopes(4, x.device))


def few_queries(x, weight, bias, lora_a, lora_b, labels):
    query, key, value = heads(x, weight[:24], weight[24:48])
    return alibi_attention(query[:, :, -5:], key, value, alibi_slopes(4, x.device))


TRAINED = {
    lora: ("x", "lora_a", "lora_b"),
    normed_lora: ("x", "lora_a", "lora_b"),
    added_norm: ("x", "weight"),
    frozen: ("x",),
    loss: ("x", "weight"),
    attention: ("x", "weight"),
}


def results(operator, arguments, forward, backward) -> list[torch.Tensor]:
    """The result and the gradients, each pass made inside a context."""
    leaves = [arguments[name].requires_grad_() for name in TRAINED[operator]]
    with forward:
        out = operator(**arguments)
    with backward:
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def nothing() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


@pytest.fixture
def products(choose_gemm):
    """Every problem is large enough for a choice; 16-bit products are made in float32 where they may be."""
    choose_gemm(True, cpu_gemm.BLAS)


@pytest.mark.parametrize("operator", TRAINED)
@pytest.mark.usefixtures("products")
def test_float32_gradients_stay_float32_where_backward_runs_inside(operator, device):
    if operator in (frozen, attention) and device != "cpu":
        pytest.skip("torch's own operators, whose backward follows autocast")
    plain = results(operator, tensors(device), nothing(), nothing())
    inside = results(operator, tensors(device), nothing(), torch.autocast(device, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("operator", TRAINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("products")
def test_inside_is_what_cast_arguments_give_outside(operator, dtype, device):
    cast = tensors(device) | {name: t for name, t in tensors(device, dtype).items() if "lora" not in name}
    plain = results(operator, cast, nothing(), nothing())
    autocasts = [torch.autocast(device, dtype) for _ in range(2)]
    inside = results(operator, tensors(device), *autocasts)
    assert inside[0].dtype == plain[0].dtype
    # gradients come back through the casts, in float32
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(inside, plain, strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in inside[1:])


@pytest.mark.parametrize("gradients", [False, True])
def test_few_queries_are_cast_and_their_products_are_not(gradients, device):
    """The backward pass is torch's own operators', and follows autocast."""
    with torch.set_grad_enabled(gradients):
        plain = few_queries(**tensors(device, torch.bfloat16))
        with torch.autocast(device, torch.bfloat16):
            inside = few_queries(**tensors(device))
    assert torch.equal(inside, plain)


@pytest.mark.parametrize("operator", TRAINED)
@pytest.mark.usefixtures("products")
def test_float64_stays(operator, device):
    plain = results(operator, tensors(device, torch.float64), nothing(), nothing())
    autocasts = [torch.autocast(device, torch.bfloat16) for _ in range(2)]
    inside = results(operator, tensors(device, torch.float64), *autocasts)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_what_is_cast(device):
    given = (torch.ones(2, device=device), None, torch.ones(2, dtype=torch.float64, device=device))
    given += (torch.ones(2, dtype=torch.int64, device=device), torch.ones(2, device=device).half())
    assert cast_for_autocast(*given) == given
    with torch.autocast(device, torch.bfloat16):
        cast = cast_for_autocast(*given)
    dtypes = [None if tensor is None else tensor.dtype for tensor in cast]
    assert dtypes == [torch.bfloat16, None, torch.float64, torch.int64, torch.bfloat16]
