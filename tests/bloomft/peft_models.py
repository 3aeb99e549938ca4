"""Models and adapters made by PEFT itself."""

from pathlib import Path

import peft
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomForCausalLM


def with_peft(model: BloomForCausalLM, *, upcast: bool = True, **options) -> PeftModel:
    """PEFT's LoRA of rank 4 and scale 2 on a BLOOM; ``upcast``: adapters in float32 on a 16-bit base."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**{**settings, **options})
    return peft.get_peft_model(model, config, autocast_adapter_dtype=upcast)


def save_with_peft(base_folder: Path, folder: Path, *, moved: bool = False, **options) -> PeftModel:
    """Writes an adapter of PEFT's; ``moved``: away from its initial values, where it may do nothing."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = with_peft(base, **{"init_lora_weights": False, **options}).eval()
    if moved:
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load_with_peft(base_folder: Path, folder: Path) -> PeftModel:
    """An adapter as PEFT reads it, on its base."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
