"""Patched BLOOM models against transformers' own in float64, which gets each document alone."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BloomConfig, BloomForCausalLM

from benchmarks.baselines.rounded_model import gradient_bound, loss_bound, round_modules
from benchmarks.gpu_check.attention_items import packed_documents
from benchmarks.gpu_check.dense_items import LOSS_SCALE
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.model.patch import adapted_layers, patch_bloom
from lorakernels.ops.lora_linear.reference import plain_lora_linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANK, SCALE = 8, 2.0
# with 8 heads the slopes are powers of two, which transformers' float32 biases keep without rounding
HEADS, LAYERS = 8, 2


def first() -> list[Item]:
    """The main job's model: packed rows in bfloat16, eager and compiled."""
    return [
        Item(f"model {mode}, bf16", check_model, {"dtype": "bf16", "compiled": mode == "compiled"})
        for mode in ("compiled", "eager")
    ]


def rest() -> list[Item]:
    """Other dtypes."""
    return [
        Item(f"model eager, {dtype}", check_model, {"dtype": dtype, "compiled": False})
        for dtype in ("fp16", "fp32")
    ]


def check_model(findings: Findings, setting: Setting, dtype: str, compiled: bool) -> None:
    """Loss and adapters' gradients in each checkpointing mode, packed and padded, and logits in eval mode.

    Compiled, what the trainer compiles: packed rows in training mode.
    """
    width, length, batch = setting.pick((1024, 2048, 4), (64, 48, 2))
    base = make_base(setting, width).to(DTYPES[dtype])
    model = patch_bloom(copy.deepcopy(base), RANK, SCALE)
    adapters = [tensor for layer in adapted_layers(model).values() for tensor in (layer.lora_a, layer.lora_b)]
    generator = torch.Generator(setting.device).manual_seed(1)
    with torch.no_grad():
        for tensor in adapters:
            tensor.normal_(std=tensor.shape[1] ** -0.5, generator=generator)
    ids = torch.randint(
        4, base.config.vocab_size, (batch, length), generator=generator, device=setting.device
    )
    packed = packed_documents(setting, batch, length)
    padded = torch.zeros_like(packed)
    padded[0, length - length // 4 :] = -1
    if compiled:
        # what is saved for the backward pass is a compiler's choice: a rehearsal makes it, too
        compile_blocks(model, (batch, length), **setting.pick({}, {"backend": "aot_eager"}))
    for kind, documents in {"packed": packed, "padded": padded}.items():
        exact = exact_step(base, adapters, ids, documents)
        rounded = exact_step(base, adapters, ids, documents, base.dtype)
        bounds = rounding_bounds(exact, rounded, base, int((documents >= 0).sum()))
        for mode in (False, True, "selective"):
            checkpoint_blocks(model, mode)
            model.train().zero_grad()
            loss = model(**batch_of(ids, documents)).loss
            (loss * LOSS_SCALE).backward()
            got = [loss.detach(), *(tensor.grad / LOSS_SCALE for tensor in adapters)]
            compare_all(findings, f"{kind}, checkpointing {mode}", got, exact[:-1], bounds[:-1])
        if compiled:
            break
        checkpoint_blocks(model, False)
        with torch.no_grad():
            logits = model.eval()(ids, document_ids=documents, use_cache=False).logits
        real = documents >= 0
        compare_all(findings, f"{kind}, eval", [logits[real]], [exact[-1][real]], bounds[-1:])


def make_base(setting: Setting, width: int) -> BloomForCausalLM:
    """A random BLOOM whose weights are large enough that attention and biases matter."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=setting.pick(4096, 128), hidden_size=width, n_layer=LAYERS, n_head=HEADS,
        initializer_range=width**-0.5,
    )  # fmt: skip
    with torch.device(setting.device):
        model = BloomForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def batch_of(ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """What the trainer gives the model: no label on padding."""
    return {"input_ids": ids, "labels": ids.masked_fill(documents < 0, -100), "document_ids": documents}


class PlainLora(nn.Module):
    """The textbook layer, differentiated by autograd."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.base_layer, self.lora_a, self.lora_b = linear, lora_a, lora_b

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        base = self.base_layer
        return plain_lora_linear(x, base.weight, base.bias, self.lora_a, self.lora_b, SCALE)


def exact_step(
    base: BloomForCausalLM,
    adapters: list[Tensor],
    ids: Tensor,
    documents: Tensor,
    rounded_to: torch.dtype | None = None,
) -> list[Tensor]:
    """Mean loss, adapters' gradients and logits by transformers in float64, each document alone.

    rounded_to rounds what each module returns: what the dtype costs at best.
    """
    model = copy.deepcopy(base).double().eval().requires_grad_(False)
    leaves = [tensor.detach().double().requires_grad_() for tensor in adapters]
    for index, block in enumerate(model.transformer.h):
        attention = block.self_attention
        attention.query_key_value = PlainLora(attention.query_key_value, *leaves[2 * index : 2 * index + 2])
    if rounded_to is not None:
        round_modules(model, rounded_to)
    logits = torch.zeros(*ids.shape, base.config.vocab_size, dtype=torch.float64, device=ids.device)
    total, labels = torch.zeros((), dtype=torch.float64, device=ids.device), 0
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for row, of_row in enumerate(documents.tolist()):
        starts = [t for t in range(len(of_row)) if t == 0 or of_row[t] != of_row[t - 1]]
        for start, stop in zip(starts, [*starts[1:], len(of_row)], strict=True):
            if of_row[start] < 0:
                continue
            out = model(ids[row : row + 1, start:stop], use_cache=False).logits[0]
            logits[row, start:stop] = out.detach()
            if stop - start > 1:
                loss = cross_entropy(out[:-1], ids[row, start + 1 : stop], reduction="sum")
                for whole, part in zip(
                    gradients, torch.autograd.grad(loss * LOSS_SCALE, leaves), strict=True
                ):
                    whole += part
                total += loss.detach()
                labels += stop - start - 1
    return [total / labels, *(gradient / (labels * LOSS_SCALE) for gradient in gradients), logits]


def rounding_bounds(
    exact: list[Tensor], rounded: list[Tensor], base: BloomForCausalLM, labels: int
) -> list[float]:
    """The largest errors of the loss, each gradient and the logits, by `baselines.rounded_model`."""
    terms = max(4 * base.config.hidden_size, base.config.vocab_size)
    loss = loss_bound(exact[0].item(), rounded[0].item(), base.dtype, labels, terms)
    pairs = zip(exact[1:], rounded[1:], strict=True)
    return [loss, *(gradient_bound(right, once, base.dtype, terms) for right, once in pairs)]


def compare_all(
    findings: Findings, name: str, got: list[Tensor], exact: list[Tensor], bounds: list[float]
) -> None:
    """Each result by its bound."""
    for index, (one, right, bound) in enumerate(zip(got, exact, bounds, strict=True)):
        result = f"{name}: {f'gradient {index}' if index else 'loss or logits'}"
        findings.compare(result, one, right, one.dtype, at_most=bound)
