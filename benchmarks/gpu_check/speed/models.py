"""BLOOM models of the same weights on one device: this project's, PEFT's, and what bounds them."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BloomForCausalLM

from benchmarks.baselines import bloom_step, lora_linear
from benchmarks.baselines.rounded_model import round_modules
from benchmarks.gpu_check.pool import Setting
from benchmarks.step_processes import ATTENTION, GEMMS
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.patch import adapted_layers
from lorakernels import frozen_linear

DTYPE = torch.bfloat16
HEAD_ROWS = 2048
INSTALLED, NARROW, OURS, COMPILED = "PEFT as installed", "PEFT, bf16 adapters", "bloomft", "bloomft compiled"
FROZEN = "frozen linear"

Build = Callable[[BloomForCausalLM], nn.Module]


def shape_of(setting: Setting, layers: int = 24) -> bloom_step.Shape:
    """BLOOM-1b7's sizes, of a row of 2,048 tokens; one layer in a rehearsal."""
    full = bloom_step.Shape(layers, hidden_size=2048, heads=16, tokens=2048, dtype="bfloat16")
    tiny = bloom_step.Shape(1, hidden_size=64, heads=4, vocab_size=512, tokens=32, dtype="bfloat16")
    return setting.pick(full, tiny)


def make_base(setting: Setting, shape: bloom_step.Shape) -> BloomForCausalLM:
    """A frozen model of random weights, in training mode."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = BloomForCausalLM(shape.config())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.to(DTYPE).requires_grad_(False).train()


def sharing(base: BloomForCausalLM) -> BloomForCausalLM:
    """A copy with modules of its own and base's parameters."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def builders(setting: Setting, size: tuple[int, int]) -> dict[str, Build]:
    """Every way to train the model on size rows and tokens, by name; PEFT as installed first."""

    def compiled_peft(build: Build) -> Build:
        def made(model: BloomForCausalLM) -> nn.Module:
            model = build(model)
            for block in model.base_model.model.transformer.h:
                block.compile(**setting.compiler)
            return model

        return made

    def compiled_ours(model: BloomForCausalLM) -> nn.Module:
        model = bloom_step.with_bloomft(model)
        compile_blocks(model, size, **setting.compiler)
        return model

    return {
        INSTALLED: bloom_step.with_peft,
        NARROW: bloom_step.with_peft_not_upcast,
        "PEFT compiled": compiled_peft(bloom_step.with_peft),
        "PEFT compiled, bf16 adapters": compiled_peft(bloom_step.with_peft_not_upcast),
        OURS: bloom_step.with_bloomft,
        COMPILED: compiled_ours,
        "addmm in place, rest as bloomft": _in_place,
        FROZEN: _frozen_but_first,
    }


def make(base: BloomForCausalLM, build: Build) -> tuple[nn.Module, list[Tensor]]:
    """A model over base's parameters, and its adapters, filled with the same numbers whatever build is."""
    model = build(sharing(base))
    filled = bloom_step.fill_adapters(model)
    return model, [value for value in filled if value.requires_grad]


def exact_model(base: BloomForCausalLM, rounded: bool) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's in float64, and its adapters; rounded rounds what every module returns to base's dtype."""
    model = bloom_step.with_peft(copy.deepcopy(base))
    adapters = bloom_step.fill_adapters(model)
    model.double()
    return (round_modules(model, base.dtype) if rounded else model), adapters


def products(setting: Setting, shape: bloom_step.Shape, rows: int, head: bool) -> dict[str, Callable]:
    """What makes functions that compute nothing but a step's products over rows times shape.tokens tokens.

    Those with frozen weights, with the model's head or without, and attention's; of random numbers.
    """
    long = bloom_step.smaller(shape, tokens=rows * shape.tokens)
    frozen = [
        (min(M, HEAD_ROWS) if name.startswith("head") else M, K, N, times * _chunks(name, M))
        for name, M, K, N, times in bloom_step.gemms(long, head)
    ]
    attention = [
        (rows * shape.heads, M, K, N, times // shape.heads)
        for _, M, K, N, times in bloom_step.attention_products(shape)
    ]
    make_products = functools.partial(_make_products, setting)
    return {
        GEMMS: functools.partial(make_products, frozen),
        ATTENTION: functools.partial(make_products, attention),
    }


def flops(shape: bloom_step.Shape, rows: int, head: bool) -> dict[str, float]:
    """FLOPs of each of `products`."""
    long = bloom_step.smaller(shape, tokens=rows * shape.tokens)
    return {
        GEMMS: bloom_step.total_flops(bloom_step.gemms(long, head)),
        ATTENTION: rows * bloom_step.total_flops(bloom_step.attention_products(shape)),
    }


def _chunks(name: str, rows: int) -> int:
    return -(-rows // HEAD_ROWS) if name.startswith("head") else 1


def _make_products(setting: Setting, sizes: list[tuple[int, ...]]) -> Callable[[], None]:
    """sizes: any batch size, M, K, N, and how often."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=setting.device, generator=generator, dtype=DTYPE)

    made = [(normal(*batch, M, K), normal(*batch, K, N), times) for *batch, M, K, N, times in sizes]

    def run() -> None:
        for left, right, times in made:
            for _ in range(times):
                torch.matmul(left, right)

    return run


def _in_place(model: BloomForCausalLM) -> nn.Module:
    model = bloom_step.with_bloomft(model)
    for layer in adapted_layers(model).values():
        layer.forward = lambda x, layer=layer: lora_linear.in_place(
            x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scale
        )
    return model


def _frozen_but_first(model: BloomForCausalLM) -> nn.Module:
    """Without adapters, but for the first layer's: a step has to train something."""
    model = bloom_step.with_bloomft(model)
    for layer in list(adapted_layers(model).values())[1:]:
        layer.forward = lambda x, layer=layer: frozen_linear(x, layer.weight, layer.bias)
        layer.requires_grad_(False)
    return model
