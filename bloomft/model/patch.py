"""Swap LoRA and fused parts into a BLOOM model, and out again.

A patched model is the same object with other classes: `BloomForCausalLM` becomes `FusedBloomForCausalLM`, its
subclass, and so on down to the attention; the target layers become `LoRALinear`. No parameter is copied.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BloomForCausalLM, BloomModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomBlock

from bloomft.model.fused_classes import FUSED_CLASSES
from bloomft.model.peft_format import adapted_layers
from bloomft.model.plain_modules import has_hooks, replaced_method
from lorakernels import LoRALinear, RowParts


def patch_bloom(
    model: BloomForCausalLM,
    r: int = 8,
    scale: float = 4.0,
    target: str = "query_key_value",
    dropout_p: float = 0.0,
    parts: Sequence[str] | None = None,
    device: torch.device | None = None,
) -> BloomForCausalLM:
    """Give every linear layer called ``target`` a LoRA adapter and the model its fused parts; in place.

    Args:
        r: rank of the adapters. ``scale`` multiplies B·A directly (PEFT's lora_alpha / r).
        dropout_p: dropout on the adapters' input, in training mode.
        parts: adapt only these of "q", "k", "v", for target "query_key_value"; None adapts every row.
        device: where the adapters are made; None for where each layer is.

    Afterwards only ``lora_a`` and ``lora_b`` (float32) require gradients. In training mode with labels the
    loss is computed without logits, see `FusedBloomForCausalLM`. Returns the same model.

    A block, an attention or another module that is not exactly BLOOM's class, or whose forward was replaced,
    keeps its forward; where the fused path would bypass it, transformers' own is taken. Hooks run as they
    do without the patch.

    Raises:
        TypeError: not a BloomForCausalLM, or a subclass.
        ValueError: already patched, no linear layer of the blocks is called ``target``, ``parts`` do not fit
            it, ``scale`` is 0, or the model has what an adapter would bypass or freeze: accelerate's hooks,
            adapters of another library, a target that is not a plain linear layer or shares its weight.
    """
    if is_patched(model):
        raise ValueError("the model is patched already; call unpatch_bloom(model) first")
    _check_model(model)
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
    _refuse_foreign_tensors(model, chosen)
    for name in chosen:
        if reason := _not_adaptable(model, linears[name]):
            raise ValueError(f"'{name}' cannot have an adapter: {reason}")
    rows = _row_parts(model, target, parts)
    adapted = {
        name: LoRALinear.from_linear(linears[name], r, scale, dropout_p=dropout_p, parts=rows, device=device)
        for name in chosen
    }
    vars(model)[_TRAINED_BEFORE] = frozenset(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    model.requires_grad_(False)
    for name, module in adapted.items():
        module.train(linears[name].training)
        module.lora_a.requires_grad_(True)
        module.lora_b.requires_grad_(True)
        model.set_submodule(name, module)
    _fuse_classes(model)
    return model


def unpatch_bloom(model: BloomForCausalLM, merge: bool = False) -> BloomForCausalLM:
    """Turn a patched model into plain transformers again, in place; returns it.

    Without ``merge`` the weights are those of before, bit for bit, and the adapters are gone; with it B·A is
    added in float32, layer by layer, and cast to the weight's dtype. Raises ValueError if it is not patched.
    """
    if (trained := _trained_before(model)) is None:
        raise ValueError("the model is not patched; call patch_bloom(model) first")
    _restore_classes(model)
    for name, layer in adapted_layers(model).items():
        plain = layer.merged() if merge else _plain_linear(layer)
        plain.train(layer.training)
        model.set_submodule(name, plain)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    del vars(model)[_TRAINED_BEFORE]
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` has been patched by `patch_bloom`."""
    return _trained_before(model) is not None


def fuse_bloom(model: BloomForCausalLM) -> BloomForCausalLM:
    """The fused parts alone, without adapters or freezing: for training every weight. In place.

    Raises TypeError and ValueError for a model that is not exactly a BloomForCausalLM, as `patch_bloom`.
    """
    _check_model(model)
    _fuse_classes(model)
    return model


def unfuse_bloom(model: BloomForCausalLM) -> BloomForCausalLM:
    """Undo `fuse_bloom`. In place."""
    _restore_classes(model)
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


_PLAIN_CLASSES = {fused: plain for plain, fused in FUSED_CLASSES.items()}
_TRAINED_BEFORE = "_trained_before_patch"  # an attribute of patched models


def _trained_before(model: nn.Module) -> frozenset[str] | None:
    """Names of the parameters that required gradients before the patch; None for a model without it."""
    return vars(model).get(_TRAINED_BEFORE)


def _check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError unless model and trunk are exactly BLOOM's, with BLOOM's own methods."""
    if not isinstance(model, BloomForCausalLM):
        raise TypeError(f"model: expected a BloomForCausalLM, got {type(model).__name__}")
    for name, kind in (("model", BloomForCausalLM), ("model.transformer", BloomModel)):
        module = model if name == "model" else model.transformer
        if type(module) not in (kind, FUSED_CLASSES[kind]):
            raise TypeError(f"{name}: expected exactly a {kind.__name__}, got {type(module).__name__}")
        if method := replaced_method(module):
            raise ValueError(
                f"{name}: its {method} is not {kind.__name__}'s; a model that accelerate spreads over "
                "devices or offloads, and one with replaced methods, cannot be patched"
            )


def _refuse_foreign_tensors(model: BloomForCausalLM, targets: Sequence[str]) -> None:
    """Raise ValueError for a tensor of the trunk that BLOOM does not have, which the patch would freeze.

    Also for one of ``targets``, names of linear layers, that is not in the place of one of BLOOM's own.
    """
    with torch.device("meta"):
        own = {name for name, _ in BloomModel(copy.deepcopy(model.config)).named_parameters()}
    trunk = model.transformer
    names = [name for name, _ in (*trunk.named_parameters(), *trunk.named_buffers())]
    names += [f"{name.removeprefix('transformer.')}.weight" for name in targets]
    if foreign := [name for name in names if name not in own]:
        raise ValueError(
            f"{foreign[0]} is not a tensor of BLOOM's ({len(foreign)} such); merge or remove another "
            "library's adapters, wrappers and quantized layers first"
        )


def _not_adaptable(model: BloomForCausalLM, linear: nn.Linear) -> str | None:
    """Why a LoRALinear cannot replace ``linear``; None where it can."""
    if type(linear) not in (nn.Linear, FUSED_CLASSES[nn.Linear]):
        return f"its class is {type(linear).__name__} and not exactly torch.nn.Linear"
    if method := replaced_method(linear):
        return f"its {method} is replaced, as accelerate's hooks do"
    if has_hooks(linear):
        return "it has hooks, which would be lost; remove them first"
    for leaf, tensor in linear.named_parameters():
        is_wrapper = is_traceable_wrapper_subclass(tensor)
        if is_wrapper or not tensor.is_floating_point():
            return (
                f"its {leaf} is a {type(tensor).__name__} of {tensor.dtype}, not a plain floating-point one"
            )
        names = [name for name, other in model.named_parameters(remove_duplicate=False) if other is tensor]
        if len(names) > 1:
            return f"its {leaf} is shared: {' and '.join(names)}"
    return None


def _fuse_classes(model: BloomForCausalLM) -> None:
    """Give each module that is exactly BLOOM's own its fused class; attention and block both or neither."""
    for module in model.modules():
        kind = type(module)
        if kind not in FUSED_CLASSES or kind is BloomAttention or replaced_method(module):
            continue
        if kind is nn.Linear and any(map(is_traceable_wrapper_subclass, module.parameters(recurse=False))):
            continue
        if kind is BloomBlock:
            attention = module.self_attention
            if type(attention) is not BloomAttention or replaced_method(attention):
                continue
            attention.__class__ = FUSED_CLASSES[BloomAttention]
        module.__class__ = FUSED_CLASSES[kind]


def _restore_classes(model: BloomForCausalLM) -> None:
    for module in model.modules():
        module.__class__ = _PLAIN_CLASSES.get(type(module), type(module))


def _row_parts(model: BloomForCausalLM, target: str, parts: Sequence[str] | None) -> RowParts | None:
    if parts is None:
        return None
    if target != "query_key_value":
        raise ValueError(f"parts {list(parts)} are rows of query_key_value; '{target}' has no such parts")
    return RowParts(model.config.n_head, ("q", "k", "v"), tuple(parts))


def _plain_linear(layer: LoRALinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = layer.weight
    if layer.bias is not None:
        linear.bias = layer.bias
    return linear
