"""Adapters of others: understood, or refused in one line that names the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bloomft.adapters import load_peft_adapter, load_peft_config
from bloomft.errors import UserError
from bloomft.generate import load_for_generation
from bloomft.patch import patch_bloom
from tests.bloomft.test_patch import close, tokens


def save_with_peft(base_folder, folder: Path, **options):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM"}
    lora = PeftConfig(**{**settings, "init_lora_weights": False, **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def adapter(base_folder, tmp_path) -> Path:
    save_with_peft(base_folder, tmp_path / "adapter", init_lora_weights=True)
    return tmp_path / "adapter"


def test_peft_s_own_adapter_is_understood(base_folder, tmp_path):
    theirs = save_with_peft(base_folder, tmp_path, init_lora_weights=True, lora_dropout=0.1)
    shape = load_peft_config(tmp_path)
    ours = patch_bloom(
        AutoModelForCausalLM.from_pretrained(base_folder), shape.lora_dim, shape.lora_scale
    ).eval()
    load_peft_adapter(ours, tmp_path)
    close(ours(tokens(2, 9)).logits, theirs(tokens(2, 9)).logits)


OTHER_KINDS = {
    "alpha_pattern": {"alpha_pattern": {"h.0.self_attention.query_key_value": 64}},
    "rank_pattern": {"rank_pattern": {"h.0.self_attention.query_key_value": 2}},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["ln_f"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "lora_bias": {"lora_bias": True},
    "exclude_modules": {"exclude_modules": "x"},
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused_by_name(base_folder, tmp_path, name):
    save_with_peft(base_folder, tmp_path, **{"init_lora_weights": True, **OTHER_KINDS[name]})
    with pytest.raises(UserError, match=rf"adapter_config.json: {name} is .*; only plain LoRA"):
        load_peft_config(tmp_path)


VALUES = {
    "r": [10**9, 0, -1, "4", 4.0, True, None, [4]],
    "lora_alpha": ["8", math.nan, math.inf, 0, None, True],
    "target_modules": [3, None, [], [3], ["dense", "query_key_value"], {"a": 1}],
    "peft_type": ["IA3", None, 3],
    "key_of_the_future": [1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in VALUES for value in VALUES[key]])
def test_values_that_make_no_sense(settings, config_path, adapter, key, value):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(
        UserError, match=key if value != 10**9 else r"lora_A.weight has shape \[4, 48\], but .* r 10"
    ) as caught:
        load_for_generation(str(config_path(settings)), str(adapter))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", "[" * 100_000, "\0", "{}"])
def test_a_damaged_configuration(adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config.json: not "):
        load_peft_config(adapter)


def test_missing_and_damaged_weights(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot read the adapter"):
        load_peft_config(adapter)
    path.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot read the adapter"):
        load_peft_config(adapter)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(settings, config_path, adapter, value):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    tensors[name][1, 1] = value
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{name} has values that are no finite numbers"):
        load_for_generation(str(config_path(settings)), str(adapter))
