"""Adapters of others: understood, or refused in one line that names the file."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from peft import EvaConfig
from peft import LoraConfig as PeftConfig
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bloomft.errors import UserError
from bloomft.model.patch import patch_bloom
from bloomft.model.peft_format import load_peft_adapter, load_peft_config
from bloomft.run.generation import load_for_generation
from tests.bloomft.model.conftest import close, tokens
from tests.bloomft.peft_models import load_with_peft, save_with_peft


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


QKV, ALL_QKV = "query_key_value", "transformer.h.{}.self_attention.query_key_value"
# Every option of PEFT's that loads, by a name for the test.
UNDERSTOOD = {
    "init random": {"init_lora_weights": False},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "init eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.5)},
    "eva's ranks": {"init_lora_weights": "eva", "rank_pattern": {ALL_QKV.format(0): 3, ALL_QKV.format(1): 5}},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"h.0.self_attention.query_key_value": 2}},
    "rank_pattern, larger": {"rank_pattern": {QKV: 7}},
    "rank_pattern, a regular expression": {"rank_pattern": {r".*\.1\..*query_key_value": 2}},
    "alpha_pattern": {"alpha_pattern": {"h.1.self_attention.query_key_value": 64, QKV: 3}},
    "patterns and rslora": {
        "rank_pattern": {"h.1.self.*": 6},
        "alpha_pattern": {"h.1.*": 5},
        "use_rslora": True,
    },
    "layers_to_transform, a list": {"layers_to_transform": [1]},
    "layers_to_transform, a number": {"layers_to_transform": 0},
    "layers_to_transform, all": {"layers_to_transform": [0, 1]},
    "exclude_modules, names": {"exclude_modules": ["h.0.self_attention.query_key_value"]},
    "exclude_modules, a regular expression": {"exclude_modules": r".*h\.1\..*"},
    "exclude_modules, none": {"exclude_modules": "x"},
    "a regular expression": {"target_modules": r".*\.self_attention\.query_key_value"},
    "a regular expression of one block": {"target_modules": r"transformer\.h\.1\..*_value"},
    "a dotted name": {"target_modules": ["self_attention.query_key_value"]},
    "dotted names of blocks": {"target_modules": [ALL_QKV.format(0), "h.1.self_attention.query_key_value"]},
    "a full name beside layers_to_transform": {
        "target_modules": [ALL_QKV.format(0), QKV],
        "layers_to_transform": [1],
    },
    "dense": {"target_modules": ["dense"]},
    "dense_h_to_4h": {"target_modules": r".*mlp\.dense_h_to_4h"},
    "dense_4h_to_h": {"target_modules": ["mlp.dense_4h_to_h"]},
    "dropout": {"lora_dropout": 0.3},
    "fractional alpha": {"lora_alpha": 2.5},
    "no task": {"task_type": None},
}
# Every option of PEFT's that is refused, with the key that the message names.
REFUSED = {
    "pissa": ("init_lora_weights", {"init_lora_weights": "pissa"}),
    "pissa by iterations": ("init_lora_weights", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("init_lora_weights", {"init_lora_weights": "olora"}),
    "mica": ("init_lora_weights", {"init_lora_weights": "mica"}),
    "dora": ("use_dora", {"use_dora": True}),
    "bias of the lora layers": ("bias", {"bias": "lora_only"}),
    "all biases": ("bias", {"bias": "all"}),
    "lora_bias": ("lora_bias", {"lora_bias": True}),
    "modules_to_save": ("modules_to_save", {"modules_to_save": ["ln_f"]}),
    "layers_pattern": ("layers_pattern", {"layers_to_transform": [1], "layers_pattern": "h"}),
    "trainable_token_indices": ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    "alora": ("alora_invocation_tokens", {"alora_invocation_tokens": [5, 6]}),
    "qalora": ("use_qalora", {"use_qalora": True}),
    "two kinds of layers": ("target_modules", {"target_modules": ["dense", QKV]}),
    "all-linear": ("target_modules", {"target_modules": "all-linear"}),
    "the embedding": ("target_modules", {"target_modules": ["word_embeddings"]}),
    "the head": ("target_modules", {"target_modules": ["lm_head"]}),
    "target_parameters": (
        "target_parameters",
        {"target_modules": [QKV], "target_parameters": ["mlp.dense_h_to_4h.weight"]},
    ),
    "bdlora": (
        "use_bdlora",
        {"use_bdlora": BdLoraConfig(target_modules_bd_b=[QKV], nblocks=2)},
    ),
}
# What needs packages or data that are not here, or acts on other models: as it stands in a configuration.
WRITTEN = {
    "init_lora_weights": ["loftq", "corda", "lora_ga", "Gaussian", 1, 0, "", [], "of the future"],
    "layer_replication": [[[0, 2], [1, 2]], []],
    "corda_config": [{"cov_mode": "x"}, {}],
    "lora_ga_config": [{"a": 1}],
    "loftq_config": [{"loftq_bits": 4}],
    "kasa_config": [{"a": 1}],
    "arrow_config": [{"top_k": 3}],
    "velora_config": [{"num_groups": 2}],
    "monteclora_config": [{"a": 1}],
    "megatron_config": [{"a": 1}],
    "fan_in_fan_out": [True],
    "ensure_weight_tying": [True],
    "alora_invocation_tokens": [[]],
    "trainable_token_indices": [[], {"word_embeddings": [1]}, 0],
    "layers_pattern": ["", "h"],
    "layers_to_transform": ["1", [True], {"a": 1}],
    "exclude_modules": [3, [3], "("],
    "use_rslora": [1, "true"],
    "rank_pattern": [[], {"(": 2}, {QKV: 0}, {QKV: True}, {QKV: 2.0}, 3],
    "alpha_pattern": [{QKV: 0}, {QKV: "8"}, {QKV: math.nan}],
    "bias": ["", "x"],
    "task_type": ["SEQ_CLS"],
    "a_key_of_the_future": [0, "", [], {}, True, 1.5],
}


@pytest.mark.parametrize("name", UNDERSTOOD)
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_peft_s_merged_model(settings, config_path, base_folder, tmp_path, name):
    save_with_peft(base_folder, tmp_path, **{"init_lora_weights": True, **UNDERSTOOD[name]}, moved=True)
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()(tokens(2, 9)).logits
    theirs = load_with_peft(base_folder, tmp_path).merge_and_unload().eval()
    ours, _ = load_for_generation(str(config_path(settings)), str(tmp_path))
    expected = theirs(tokens(2, 9)).logits
    assert (expected - plain).abs().max() > 0.1, "the adapter does nothing"
    close(ours(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_adapters_are_refused_by_name(settings, config_path, base_folder, tmp_path, name):
    key, options = REFUSED[name]
    save_with_peft(base_folder, tmp_path, **{"init_lora_weights": True, **options})
    with pytest.raises(UserError, match=rf"adapter_config.json: {key} is ") as caught:
        load_for_generation(str(config_path(settings)), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_every_option_of_peft_s_is_tried():
    ours = {
        "peft_version",
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
    ours |= {"r", "lora_alpha", "runtime_config", "megatron_core", "qalora_group_size"}
    tried = set(WRITTEN) | {key for options in UNDERSTOOD.values() for key in options}
    tried |= {key for _, options in REFUSED.values() for key in options}
    assert {field.name for field in dataclasses.fields(PeftConfig)} - ours <= tried


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRITTEN for value in WRITTEN[key]])
def test_values_that_are_not_understood(settings, config_path, adapter, key, value):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"adapter_config.json: {key} is ") as caught:
        load_for_generation(str(config_path(settings)), str(adapter))
    assert "\n" not in str(caught.value)


def test_a_target_without_weights_is_refused(settings, config_path, adapter):
    path = adapter / "adapter_config.json"
    for targets in (["dense", QKV], ".*", r".*\.(dense|query_key_value)"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
        with pytest.raises(UserError, match=r"target_modules is .*, which .*dense.* matches"):
            load_for_generation(str(config_path(settings)), str(adapter))
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"target_modules": r".*h\.0\..*query_key_value"})
    )
    with pytest.raises(UserError, match=r"the model has no layer for .*h\.1\."):
        load_for_generation(str(config_path(settings)), str(adapter))


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
    with pytest.raises(UserError, match=rf"{name} has values that are not finite numbers"):
        load_for_generation(str(config_path(settings)), str(adapter))
