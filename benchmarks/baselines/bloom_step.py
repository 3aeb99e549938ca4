"""A whole BLOOM training step by transformers and PEFT, and with this project's parts added one by one.

Every rival has the same weights, in memory that all processes share, the same adapters and the same rows.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel

from benchmarks.baselines.cross_entropy import row_chunks
from benchmarks.baselines.rounded_model import round_modules
from bloomft.model.fused_classes import (
    FUSED_CLASSES,
    FusedBloomAttention,
    FusedBloomForCausalLM,
    FusedBloomModel,
)
from bloomft.model.patch import adapted_layers, patch_bloom
from bloomft.process import setup_process
from lorakernels import cpu_gemm

RANK, SCALE = 8, 4.0


@dataclass(frozen=True)
class Shape:
    """BLOOM-560m's sizes; fewer layers where time is short."""

    layers: int = 24
    hidden_size: int = 1024
    heads: int = 16
    vocab_size: int = 250_880
    tokens: int = 1024
    masked: int = 0  # labels at the start that are prompt
    dtype: str = "float32"

    def config(self) -> BloomConfig:
        """The model's configuration."""
        return BloomConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            n_layer=self.layers,
            n_head=self.heads,
            use_cache=False,
        )

    def batch(self) -> dict[str, Tensor]:
        """One row of random token ids and its labels."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocab_size, (1, self.tokens), generator=generator)
        labels = ids.clone()
        labels[:, : self.masked] = -100
        return {"input_ids": ids, "labels": labels}


def write_weights(shape: Shape, folder: Path) -> Path:
    """Random weights of ``shape``, flat, in a file that rivals map into memory."""
    with torch.device("meta"):
        model = BloomForCausalLM(shape.config())
    path = folder / "weights"
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    with path.open("wb") as file:
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator).mul_(0.02)
            if "layernorm" in name or "ln_f" in name:
                value += 1.0 if name.endswith("weight") else 0.0
            file.write(value.to(dtype).view(torch.uint8).numpy().tobytes())
    return path


def load_base(shape: Shape, weights: Path) -> BloomForCausalLM:
    """The base model over the shared weights, frozen."""
    with torch.device("meta"):
        model = BloomForCausalLM(shape.config())
    dtype = getattr(torch, shape.dtype)
    total = weights.stat().st_size // dtype.itemsize
    flat = torch.from_file(str(weights), shared=True, size=total, dtype=dtype)
    offset = 0
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = flat[offset : offset + parameter.numel()].view(parameter.shape)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        offset += parameter.numel()
    model.lm_head.weight = model.transformer.word_embeddings.weight
    return model.train()


def with_peft(model: BloomForCausalLM, *, upcast_adapters: bool = True) -> nn.Module:
    """PEFT's adapters; ``upcast_adapters`` is its default."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules=["query_key_value"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=upcast_adapters)


def with_peft_not_upcast(model: BloomForCausalLM) -> nn.Module:
    """PEFT's adapters in the base's dtype."""
    return with_peft(model, upcast_adapters=False)


def _swap(model: nn.Module, classes: dict[type, type]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))


def _peft_with_attention(model: BloomForCausalLM) -> nn.Module:
    _swap(model, {BloomAttention: FusedBloomAttention, BloomModel: FusedBloomModel})
    return with_peft(model)


def _peft_with_attention_and_loss(model: BloomForCausalLM) -> nn.Module:
    _swap(
        model,
        {
            BloomAttention: FusedBloomAttention,
            BloomModel: FusedBloomModel,
            BloomForCausalLM: FusedBloomForCausalLM,
        },
    )
    return with_peft(model)


def _lora_without_feed_forward(model: BloomForCausalLM) -> nn.Module:
    patch_bloom(model, RANK, SCALE)
    plain = {fused: kind for kind, fused in FUSED_CLASSES.items()}
    kept = (FusedBloomAttention, FusedBloomModel, FusedBloomForCausalLM)
    _swap(model, {fused: kind for fused, kind in plain.items() if fused not in kept})
    return model


def with_bloomft(model: BloomForCausalLM) -> nn.Module:
    """This project's model."""
    return patch_bloom(model, RANK, SCALE)


@dataclass(frozen=True)
class Rival:
    """How a model is built and whether its process has `setup_process`'s settings."""

    build: Callable[[BloomForCausalLM], nn.Module]
    settings: bool


RIVALS = {
    "PEFT as installed": Rival(with_peft, settings=False),
    "PEFT, same thread and memory settings": Rival(with_peft, settings=True),
    "PEFT, same settings, bf16 adapters": Rival(with_peft_not_upcast, settings=True),
    "PEFT + our attention": Rival(_peft_with_attention, settings=True),
    "PEFT + our attention and loss": Rival(_peft_with_attention_and_loss, settings=True),
    "our attention, loss and LoRA layer": Rival(_lora_without_feed_forward, settings=True),
    "bloomft": Rival(with_bloomft, settings=True),
}


def adapters(model: nn.Module) -> list[Tensor]:
    """lora_a and lora_b of every layer in order, PEFT's or ours."""
    if ours := adapted_layers(model):
        return [value for layer in ours.values() for value in (layer.lora_a, layer.lora_b)]
    return [value for name, value in model.named_parameters() if "lora_" in name]


def fill_adapters(model: nn.Module) -> list[Tensor]:
    """`adapters`, set to the same small numbers for PEFT and ours."""
    generator = torch.Generator().manual_seed(2)
    found = adapters(model)
    with torch.no_grad():
        for value in found:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    return found


def make_step(name: str, shape: Shape, weights: Path) -> tuple[Callable[[], Tensor], list[Tensor], nn.Module]:
    """A function that runs forward and backward and returns the loss; the adapters whose .grad it fills; the
    model. What is chosen by measurement is chosen here."""
    if RIVALS[name].settings:
        setup_process()
    model = RIVALS[name].build(load_base(shape, weights))
    trained = fill_adapters(model)
    for layer in adapted_layers(model).values():
        layer.prepare(shape.tokens)
        cpu_gemm.fastest(layer.weight.dtype)
    batch = shape.batch()

    def step() -> Tensor:
        for value in trained:
            value.grad = None
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return step, trained, model


def exact_results(
    shape: Shape, weights: Path, threads: int, rounded: bool = False
) -> tuple[float, list[np.ndarray]]:
    """Loss and adapter gradients of PEFT's model in float64, except for transformers' float32 softmax.

    With rounded, every module's result goes through the shape's dtype. The logits are made a few rows at a
    time. For a fresh process.
    """
    torch.set_num_threads(threads)
    setup_process()
    model = with_peft(load_base(shape, weights))
    trained = fill_adapters(model)
    model.double()
    if rounded:
        round_modules(model, getattr(torch, shape.dtype))
    batch = shape.batch()
    loss, gradients = recomputed_step(model, trained, batch["input_ids"], batch["labels"])
    return loss, [gradient.numpy() for gradient in gradients]


def recomputed_step(
    model: nn.Module, trained: list[Tensor], ids: Tensor, labels: Tensor
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a PEFT model in its own dtype; labels [B, T] are not shifted yet.

    Blocks are recomputed in the backward pass and the logits made a few rows at a time: in float64 all of
    them together would not fit into memory.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    bloom = model.base_model.model
    hidden = bloom.transformer(ids).last_hidden_state
    loss = row_chunks(hidden[:, :-1].flatten(0, 1), bloom.lm_head.weight, labels[:, 1:].flatten())
    loss.backward()
    return loss.item(), [value.grad for value in trained]


def gemms(shape: Shape, head: bool = True) -> list[tuple[str, int, int, int, int]]:
    """(name, M, K, N, times) of every product with frozen weights in the step, with or without its head.

    A frozen layer has two, y = x·Wᵀ and dx = dy·W; in a whole model the first query_key_value has no dx.
    Attention's products are `attention_products`; the adapters' are left out: a floor may be low, not high.
    """
    M, H, L = shape.tokens, shape.hidden_size, shape.layers
    rows = shape.tokens - max(1, shape.masked)
    pairs = [("query_key_value", H, 3 * H), ("dense", H, H), ("dense_h_to_4h", H, 4 * H)]
    pairs.append(("dense_4h_to_h", 4 * H, H))
    listed = []
    for name, K, N in pairs:
        listed.append((f"{name} forward", M, K, N, L))
        listed.append((f"{name} backward", M, N, K, L - (head and name == "query_key_value")))
    if head:
        listed.append(("head forward", rows, H, shape.vocab_size, 1))
        listed.append(("head backward", rows, shape.vocab_size, H, 1))
    return listed


def attention_products(shape: Shape) -> list[tuple[str, int, int, int, int]]:
    """(name, M, K, N, times) of attention's products, as many FLOPs as half the keys, which causality leaves.

    Six a layer and head: scores and values forward, dP, dV, dK and dQ backward; the scores that a
    memory-saving backward pass recomputes are left out.
    """
    T, D, times = shape.tokens, shape.hidden_size // shape.heads, shape.layers * shape.heads
    wide = [(name, T, D, T // 2, times) for name in ("scores", "dP")]
    return wide + [(name, T, T // 2, D, times) for name in ("values", "dV", "dK", "dQ")]


def make_attention_products(shape: Shape) -> Callable[[], None]:
    """A function that computes `attention_products` and nothing else, a layer's heads at once, in float32."""
    setup_process()
    products = []
    for _, M, K, N, times in attention_products(shape):
        left, right = torch.ones(shape.heads, M, K), torch.full((shape.heads, K, N), 0.01)
        products.append((left, right, times // shape.heads))

    def run() -> None:
        for left, right, times in products:
            for _ in range(times):
                torch.bmm(left, right)

    return run


def make_gemms(shape: Shape, head: bool = True) -> Callable[[], None]:
    """A function that computes `gemms` and nothing else, the head in chunks of 512 rows, in float32.

    By the library that is faster on this machine.
    """
    setup_process()
    products, multiply = [], cpu_gemm.fastest(torch.float32).forward
    for name, M, K, N, times in gemms(shape, head):
        chunk = min(M, 512) if name.startswith("head") else M
        weight = torch.full((N, K), 0.01)
        full, rest = divmod(M, chunk)
        products.append((torch.ones(chunk, K), weight, times, full, rest))

    def run() -> None:
        for x, weight, times, full, rest in products:
            for _ in range(times):
                for _ in range(full):
                    multiply(x, weight, None)
                if rest:
                    multiply(x[:rest], weight, None)

    return run


def total_flops(products: list[tuple[str, int, int, int, int]]) -> float:
    """FLOPs of `gemms` or `attention_products`."""
    return float(sum(2 * M * K * N * times for _, M, K, N, times in products))


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A folder for the shared weights, in memory if the system has /dev/shm."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)


def smaller(shape: Shape, **changes: int) -> Shape:
    """``shape`` with some sizes changed."""
    return dataclasses.replace(shape, **changes)
