"""Adapters in PEFT's file format, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bloomft.config import LoraConfig
from bloomft.errors import UserError
from bloomft.files import write_atomically
from lorakernels import LoRALinear

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name to layer of every `LoRALinear`, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def save_peft_adapter(model: nn.Module, folder: Path, base_name: str) -> None:
    """Write the adapters of a patched model so that ``PeftModel.from_pretrained`` loads them.

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
    """What a folder's ``adapter_config.json`` says; `UserError` if it is none or no plain LoRA."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, r, alpha = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable adapter configuration: {error}") from error
    extra = [key for key in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern") if config.get(key)]
    if kind != "LORA" or extra or r < 1:
        raise UserError(
            f"{path}: only plain LoRA adapters can be loaded (peft_type {kind} {' '.join(extra)})"
        )
    targets = config.get("target_modules")
    targets = [targets] if isinstance(targets, str) else list(targets or [])
    if len(targets) != 1:
        raise UserError(f"{path}: one target module expected, found {targets}")
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
        raise UserError(f"{path}: the model has no place for {min(tensors)}")


def _copy(layer: LoRALinear, tensors: dict[str, Tensor], prefix: str, path: Path) -> None:
    for letter, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
        name = f"{prefix}.lora_{letter}.weight"
        value = tensors.pop(name, None)
        if value is None or value.shape != parameter.shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise UserError(f"{path}: {name} is {found}; expected {tuple(parameter.shape)}")
        parameter.data.copy_(value)
