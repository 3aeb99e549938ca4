"""Read and write adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bloomft.config.keys import TARGETS, LoraConfig
from bloomft.errors import UserError
from bloomft.files import write_atomically
from lorakernels import LoRALinear

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX, _SUFFIX_A, _SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# The keys of a configuration that are understood, each with its values, or None where `_PeftConfig.read`
# checks them or no value changes the adapter's function. Any other key must be null or false.
_UNDERSTOOD: dict[str, tuple[object, ...] | None] = {
    **dict.fromkeys(("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")),
    **dict.fromkeys(("exclude_modules", "layers_to_transform")),
    **dict.fromkeys(("lora_dropout", "inference_mode", "peft_version", "auto_mapping")),
    **dict.fromkeys(("base_model_name_or_path", "revision")),
    # these act on megatron's layers, on use_qalora and on fresh adapters only
    **dict.fromkeys(("megatron_core", "qalora_group_size", "eva_config")),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # the others change the base, or take part in the forward pass
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "loftq_config": ({},),
    "modules_to_save": ([],),
}


@dataclass(frozen=True)
class _PeftConfig:
    """What ``adapter_config.json`` says about the adapter's function, by the rules of PEFT's `LoraModel`."""

    r: int
    alpha: float
    targets: str | list[str]
    excluded: str | list[str]
    blocks: list[int]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool

    @classmethod
    def read(cls, folder: Path) -> "_PeftConfig":
        """The configuration in ``folder``; `UserError` naming the key that is not understood."""
        path = folder / CONFIG_NAME
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a readable adapter configuration: {error}") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise UserError(f"{path}: not the configuration of a LoRA adapter (peft_type LORA)")
        for key, value in config.items():
            allowed = _UNDERSTOOD.get(key, ())
            same = allowed is None or any(type(one) is type(value) and one == value for one in allowed)
            if not same and value is not None and value is not False:
                raise UserError(f"{path}: {key} is {value!r:.80}; only plain LoRA adapters can be loaded")

        def take(key: str, default: Any, expected: str, is_valid: Callable[[Any], bool]) -> Any:
            value = default if config.get(key) is None else config[key]
            if not is_valid(value):
                raise UserError(f"{path}: {key} is {value!r:.80}; expected {expected}")
            return value

        blocks = take(
            "layers_to_transform",
            [],
            "an integer or a list of integers",
            lambda value: all(type(one) is int for one in (value if isinstance(value, list) else [value])),
        )
        return cls(
            take("r", None, "an integer ≥ 1", _is_rank),
            take("lora_alpha", None, "a number other than 0", _is_alpha),
            take("target_modules", None, "names of layers, or a regular expression", _are_layers),
            take(
                "exclude_modules", [], "names, or a regular expression", lambda v: v == [] or _are_layers(v)
            ),
            blocks if isinstance(blocks, list) else [blocks],
            take("rank_pattern", {}, "names with an integer ≥ 1 each", lambda v: _is_pattern(v, _is_rank)),
            take(
                "alpha_pattern",
                {},
                "names with a number other than 0 each",
                lambda v: _is_pattern(v, _is_alpha),
            ),
            take("use_rslora", False, "true or false", lambda value: isinstance(value, bool)),
        )

    def selects(self, layer: str) -> bool:
        """Whether the layer of this full name has an adapter (PEFT's `check_target_module_exists`)."""
        if self.excluded and _names_layer(self.excluded, layer):
            return False
        if isinstance(self.targets, str) or layer in self.targets or not self.blocks:
            return _names_layer(self.targets, layer)
        block = re.match(r".*?\.[^.]*\.(\d+)\.", layer)
        return _names_layer(self.targets, layer) and block is not None and int(block[1]) in self.blocks

    def rank(self, layer: str) -> int:
        """The rank of one layer's adapter."""
        return _by_pattern(self.rank_pattern, layer, self.r)

    def scale(self, layer: str) -> float:
        """What multiplies B·A in one layer; rsLoRA is https://arxiv.org/abs/2312.03732."""
        rank = self.rank(layer)
        return _by_pattern(self.alpha_pattern, layer, self.alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name to layer of every `LoRALinear`, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def holds_adapters(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether ``state``, of ``model`` or of a compilation of it, has the current adapters."""
    values = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    return all(
        f"{name}.{part}" in values and torch.equal(values[f"{name}.{part}"].cpu(), getattr(layer, part).cpu())
        for name, layer in adapted_layers(model).items()
        for part in ("lora_a", "lora_b")
    )


def save_peft_adapter(
    model: nn.Module, folder: Path, base_name: str | None, revision: str | None = None
) -> None:
    """Write the adapters of a patched model so that ``PeftModel.from_pretrained`` loads them.

    ``base_name`` and ``revision`` are what ``from_pretrained`` was given for the base.

    ``lora_b`` is written with all its rows; where only some of q, k and v are adapted, the others are zero.
    """
    layers = adapted_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}{_SUFFIX_A}"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}{_SUFFIX_B}"] = layer.full_lora_b().detach().cpu().contiguous()
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
    """The shape of the adapter in ``folder``; `UserError` if it is not a plain LoRA adapter.

    Reads ``adapter_config.json`` and the header of the weights. Whatever else the configuration sets is
    refused by name, since it changes or may change the adapter's function. Where layers differ in rank the
    largest counts, where they differ in scale the first layer's.
    """
    config, path = _PeftConfig.read(folder), folder / WEIGHTS_NAME
    ranks = {}
    try:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a mapping
                if name.startswith(_PREFIX) and name.endswith(_SUFFIX_A):
                    layer = name.removeprefix(_PREFIX).removesuffix(_SUFFIX_A)
                    ranks[layer] = config.rank(layer)
                    if (shape := tensors.get_slice(name).get_shape())[:1] != [ranks[layer]]:
                        said = f"but {CONFIG_NAME} says r {ranks[layer]}"
                        raise UserError(f"{path}: {name} has shape {shape}, {said}")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the adapter: {error}") from error
    kinds = sorted({layer.rsplit(".", 1)[-1] for layer in ranks})
    if len(kinds) != 1 or kinds[0] not in TARGETS:
        raise UserError(
            f"{folder / CONFIG_NAME}: target_modules is {config.targets!r:.80}, with weights for "
            f"{', '.join(kinds) or 'no layer'}; one kind of layer can have adapters: {', '.join(TARGETS)}"
        )
    first = next(iter(ranks))
    return LoraConfig(
        lora_dim=max(ranks.values()), lora_scale=config.scale(first), attention_layer_name=kinds[0]
    )


def load_peft_adapter(model: nn.Module, folder: Path) -> None:
    """Copy a PEFT adapter's tensors into a patched model without parts; `UserError` where they do not fit.

    A layer that the adapter leaves out gets zeros; a smaller rank is padded with zeros, and a scale other
    than the model's is multiplied into B.
    """
    config, path = _PeftConfig.read(folder), folder / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot read the adapter: {error}") from error
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear | nn.Linear):
            continue
        if not config.selects(name):
            if isinstance(layer, LoRALinear):
                layer.lora_b.data.zero_()
        elif isinstance(layer, LoRALinear):
            _copy(layer, tensors, name, config, path)
        else:
            raise UserError(
                f"{folder / CONFIG_NAME}: target_modules is {config.targets!r:.80}, which {name} matches; "
                f"{WEIGHTS_NAME} has nothing for it"
            )
    if tensors:
        raise UserError(f"{path}: the model has no layer for {min(tensors)}")


def _copy(layer: LoRALinear, tensors: dict[str, Tensor], name: str, config: _PeftConfig, path: Path) -> None:
    rank, scale = config.rank(name), config.scale(name)
    # the part of each parameter that the adapter has
    parts = {_SUFFIX_A: layer.lora_a.data[:rank], _SUFFIX_B: layer.lora_b.data[:, :rank]}
    for suffix, part in parts.items():
        full = f"{_PREFIX}{name}{suffix}"
        value = tensors.pop(full, None)
        if value is None or value.shape != part.shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise UserError(f"{path}: {full} is {found}; expected {tuple(part.shape)}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{path}: {full} has values that are not finite numbers")
        part.copy_(value)
    layer.lora_b.data[:, rank:] = 0
    if scale != layer.scale:
        layer.lora_b.data *= scale / layer.scale


def _names_layer(targets: str | list[str], layer: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return layer in targets or any(layer.endswith(f".{target}") for target in targets)


def _by_pattern(pattern: dict[str, Any], layer: str, default: Any) -> Any:
    found = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, default)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value != 0


def _is_pattern(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(_is_expression, value)) and all(map(is_valid, value.values()))


def _are_layers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(name, str) for name in value)
    return isinstance(value, str) and _is_expression(value)


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError):
        return False
    return True
