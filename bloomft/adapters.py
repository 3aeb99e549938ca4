"""Adapters in PEFT's file format, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bloomft.config import LoraConfig
from bloomft.errors import UserError
from bloomft.files import write_atomically
from lorakernels import LoRALinear

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What a configuration may set: to this value, or to any value where it is None.
_UNDERSTOOD = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules", "inference_mode", "peft_version")),
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "revision")),
    # these act on megatron's layers, on use_qalora and on fresh adapters only
    **dict.fromkeys(("megatron_core", "qalora_group_size")),
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "init_lora_weights": True,
}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name to layer of every `LoRALinear`, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def holds_adapters(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether ``state``, of ``model`` or of a compilation of it, has the adapters as they are now."""
    values = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    return all(
        f"{name}.{part}" in values and torch.equal(values[f"{name}.{part}"].cpu(), getattr(layer, part).cpu())
        for name, layer in adapted_layers(model).items()
        for part in ("lora_a", "lora_b")
    )


def save_peft_adapter(model: nn.Module, folder: Path, base_name: str, revision: str | None = None) -> None:
    """Write the adapters of a patched model so that ``PeftModel.from_pretrained`` loads them.

    ``base_name`` and ``revision`` are what ``from_pretrained`` was given for the base.

    ``lora_b`` is written with all its rows; where only some of q, k and v are adapted, the others are zero.
    """
    layers = adapted_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.full_lora_b().detach().cpu().contiguous()
    alpha = first.scale * first.r
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": first.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": first.dropout_p,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_atomically(folder / WEIGHTS_NAME, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def load_peft_config(folder: Path) -> LoraConfig:
    """The shape of the adapter in ``folder``; `UserError` if it has none, or more than one plain LoRA.

    Read are ``adapter_config.json`` and the header of the weights. Whatever else the configuration sets is
    refused by name, since it would change the adapter's function or is not known to leave it.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable adapter configuration: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not the configuration of a LoRA adapter (peft_type LORA)")
    for key, value in config.items():
        if value and (key not in _UNDERSTOOD or _UNDERSTOOD[key] not in (None, value)):
            raise UserError(f"{path}: {key} is {value!r:.80}; only plain LoRA adapters can be loaded")
    r, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(r) is not int or r < 1:
        raise UserError(f"{path}: r is {r!r:.80}; expected an integer ≥ 1")
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
        raise UserError(f"{path}: lora_alpha is {alpha!r:.80}; expected a number other than 0")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or len(targets) != 1 or not isinstance(targets[0], str):
        raise UserError(f"{path}: target_modules is {targets!r:.80}; expected the name of one layer")
    _check_rank(folder / WEIGHTS_NAME, r)
    return LoraConfig(lora_dim=r, lora_scale=alpha / r, attention_layer_name=targets[0])


def load_peft_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a PEFT adapter's tensors into a patched model without parts; `UserError` where they do not fit."""
    path = folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the adapter: {error}") from error
    for name, layer in adapted_layers(model).items():
        _copy(layer, tensors, f"{_PREFIX}{name}", path)
    if tensors:
        raise UserError(f"{path}: the model has no layer for {min(tensors)}")


def _check_rank(path: Path, r: int) -> None:
    """Raise `UserError` unless the weights have rank ``r``, before a model is given adapters of that size."""
    try:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, no mapping
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".lora_A.weight") and shape[:1] != [r]:
                    raise UserError(f"{path}: {name} has shape {shape}, but {CONFIG_NAME} says r {r}")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the adapter: {error}") from error


def _copy(layer: LoRALinear, tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    for letter, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
        name = f"{prefix}.lora_{letter}.weight"
        value = tensors.pop(name, None)
        if value is None or value.shape != parameter.shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise UserError(f"{path}: {name} is {found}; expected {tuple(parameter.shape)}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{path}: {name} has values that are no finite numbers")
        parameter.data.copy_(value)
