"""Swap LoRA and fused parts into a BLOOM model, and out again.

A patched model is the same object with other classes: `BloomForCausalLM` becomes `FusedBloomForCausalLM`, its
subclass, and so on down to the attention; the target layers become `LoRALinear`. No parameter is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BloomForCausalLM

from bloomft.adapters import adapted_layers
from bloomft.fused_model import FUSED_CLASSES
from lorakernels import LoRALinear, RowParts


def patch_bloom(
    model: BloomForCausalLM,
    r: int = 8,
    scale: float = 4.0,
    target: str = "query_key_value",
    dropout_p: float = 0.0,
    parts: Sequence[str] | None = None,
) -> BloomForCausalLM:
    """Give every linear layer called ``target`` a LoRA adapter and the model its fused parts; in place.

    Args:
        r: rank of the adapters. ``scale`` multiplies B·A directly (PEFT's lora_alpha / r).
        dropout_p: dropout on the adapters' input, in training mode.
        parts: adapt only these of "q", "k", "v", for target "query_key_value"; None adapts every row.

    Afterwards only ``lora_a`` and ``lora_b`` (float32) require gradients. In training mode with labels the
    loss is computed without logits, see `FusedBloomForCausalLM`. Returns the same model.

    Raises:
        TypeError: not a BloomForCausalLM.
        ValueError: already patched, no linear layer of the blocks is called ``target``, ``parts`` do not fit
            it, or ``scale`` is 0.
    """
    if not isinstance(model, BloomForCausalLM):
        raise TypeError(f"model: expected a BloomForCausalLM, got {type(model).__name__}")
    if is_patched(model):
        raise ValueError("the model is patched already; call unpatch_bloom(model) first")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linears if name.rsplit(".", 1)[-1] == target]
    if target == "lm_head":
        raise ValueError("'lm_head' cannot have an adapter: its weight is that of the embedding")
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears} - {"lm_head"})
        raise ValueError(f"no linear layer is called '{target}'; there are: {', '.join(known)}")
    if model.config.slow_but_exact and model.config.pretraining_tp > 1 and target.startswith("dense"):
        # transformers slices these weights by hand there and never calls the layer.
        raise ValueError(f"'{target}' cannot have an adapter while the model's config says slow_but_exact")

    if scale == 0:
        raise ValueError("scale: expected a number other than 0, with which the adapters would do nothing")
    rows = _row_parts(model, target, parts)
    adapted = {
        name: LoRALinear.from_linear(linears[name], r, scale, dropout_p=dropout_p, parts=rows)
        for name in chosen
    }
    model._patch_record = PatchRecord(
        tuple(chosen), tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    )
    model.requires_grad_(False)
    for name, module in adapted.items():
        module.train(linears[name].training)
        module.lora_a.requires_grad_(True)
        module.lora_b.requires_grad_(True)
        model.set_submodule(name, module)
    _swap_classes(model, FUSED_CLASSES)
    return model


def unpatch_bloom(model: BloomForCausalLM, merge: bool = False) -> BloomForCausalLM:
    """Turn a patched model into plain transformers again, in place; returns it.

    Without ``merge`` the weights are those of before, bit for bit, and the adapters are gone; with it B·A is
    added in float32, layer by layer, and cast to the weight's dtype. Raises ValueError if it is not patched.
    """
    if not is_patched(model):
        raise ValueError("the model is not patched; call patch_bloom(model) first")
    _swap_classes(model, _PLAIN_CLASSES)
    for name in model._patch_record.layers:
        layer = model.get_submodule(name)
        plain = layer.merged() if merge else _plain_linear(layer)
        plain.train(layer.training)
        model.set_submodule(name, plain)
    trainable = set(model._patch_record.trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    del model._patch_record
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_bloom` was here."""
    return isinstance(getattr(model, "_patch_record", None), PatchRecord)


def fuse_bloom(model: BloomForCausalLM) -> BloomForCausalLM:
    """The fused parts alone, without adapters or freezing: for training every weight. In place."""
    _swap_classes(model, FUSED_CLASSES)
    return model


def unfuse_bloom(model: BloomForCausalLM) -> BloomForCausalLM:
    """Undo `fuse_bloom`. In place."""
    _swap_classes(model, _PLAIN_CLASSES)
    return model


def adapter_state(model: BloomForCausalLM) -> dict[str, Tensor]:
    """Name to tensor of every ``lora_a`` and ``lora_b`` of a patched model, in layer order, not copied."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in adapted_layers(model).items()
        for part in ("lora_a", "lora_b")
    }


def load_adapter_state(model: BloomForCausalLM, state: dict[str, Tensor]) -> None:
    """Copy ``state`` into a patched model's adapters. Raises ValueError naming what does not fit."""
    own = adapter_state(model)
    if odd := sorted(own.keys() ^ state.keys()):
        where = "the checkpoint lacks" if odd[0] in own else "the model lacks"
        raise ValueError(f"{where} {odd[0]} ({len(odd)} adapter tensors differ)")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the model's {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


@dataclass(frozen=True)
class PatchRecord:
    """What `unpatch_bloom` needs: the adapted layers and the parameters that required gradients before."""

    layers: tuple[str, ...]
    trainable: tuple[str, ...]


_PLAIN_CLASSES = {fused: plain for plain, fused in FUSED_CLASSES.items()}


def _swap_classes(model: nn.Module, mapping: dict[type, type]) -> None:
    for module in model.modules():
        module.__class__ = mapping.get(type(module), type(module))


def _row_parts(model: BloomForCausalLM, target: str, parts: Sequence[str] | None) -> RowParts | None:
    if parts is None:
        return None
    if target != "query_key_value":
        raise ValueError(f"parts {list(parts)} are rows of query_key_value; '{target}' has no such parts")
    return RowParts(model.config.n_head, ("q", "k", "v"), tuple(parts))


def _plain_linear(layer: LoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear
