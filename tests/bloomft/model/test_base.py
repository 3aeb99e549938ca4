"""A base is the one that was asked for, whole, or one line that names the file."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

from benchmarks import process_memory
from bloomft.config.keys import LoraConfig, TransformerConfig
from bloomft.errors import UserError
from bloomft.model.base import load_base, patch_base


def load(folder, **options):
    return load_base(TransformerConfig(pretrained_model_name_or_path=str(folder), **options))


def assert_refused(folder, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "transformer.ln_f.weight"
TENSORS = {
    "missing": (lambda t: t.pop(NORM), f"model.safetensors: lacks {NORM}"),
    "foreign": (lambda t: t.update(extra=torch.zeros(3)), "model.safetensors: has an unexpected extra"),
    "shape": (lambda t: t.update({NORM: torch.zeros(7)}), rf"safetensors: {NORM} has shape \[7\], .*\[48\]"),
    "integers": (lambda t: t.update({NORM: torch.zeros(48, dtype=torch.int8)}), f"{NORM} is stored as I8"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_than_the_configuration_s(base_copy, name):
    change, expected = TENSORS[name]
    change_tensors(base_copy, change)
    assert_refused(base_copy, expected)


SETTINGS = {
    "too_few_layers": ({"n_layer": 1}, "2 layers are stored, but config.json has n_layer 1"),
    "too_many_layers": ({"n_layer": 10**12}, "2 layers are stored, but config.json has n_layer 10000"),
    "vocab_size": ({"vocab_size": 2**40}, r"word_embeddings.weight has shape \[384, 48\], by config.json"),
    "no_heads": ({"n_head": 0}, "config.json: n_head is 0"),
    "odd_heads": ({"n_head": 7}, "config.json: hidden_size 48 is not a multiple of n_head 7"),
    "negative": ({"vocab_size": -1}, "config.json: vocab_size is -1"),
    "text": ({"hidden_size": "x"}, "config.json: .*hidden_size"),
    "null": ({"hidden_size": None}, "config.json: .*hidden_size"),
    "bad_dtype": ({"dtype": "floatx"}, "config.json: .*floatx"),
    "int_dtype": ({"dtype": "int8"}, "config.json: dtype is torch.int8"),
    "untied": ({"tie_word_embeddings": False}, "model.safetensors: lacks lm_head.weight"),
    "quantised": ({"quantization_config": {"quant_method": "x"}}, "config.json: quantization_config"),
    "quantised_oddly": ({"quantization_config": 3}, "config.json: "),
    "no_type": ({"model_type": 3}, "config.json: "),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_configuration_that_does_not_fit_its_tensors(base_copy, name):
    changes, expected = SETTINGS[name]
    change_json(base_copy / "config.json", **changes)
    assert_refused(base_copy, expected)


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", "[" * 100_000, "\0"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_no_object(base_copy, file, text):
    (base_copy / file).write_text(text)
    assert_refused(base_copy, f"{file}: ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_empty_object(base_copy, file):
    (base_copy / file).write_text("{}")
    assert_refused(base_copy, f"{file}: ")


def test_a_tokenizer_of_another_model(base_copy):
    content = json.loads((base_copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    (base_copy / "tokenizer.json").write_text(json.dumps(content))
    assert_refused(base_copy, "the tokenizer has token 1000000, the model tokens below 384")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "said", [{"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float64"}, {}]
)
def test_the_stored_precision_is_kept_whatever_the_configuration_says(base_copy, stored, said, capsys):
    change_tensors(base_copy, lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    path = base_copy / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("dtype", None)
    path.write_text(json.dumps(settings | said))
    base = load(base_copy)
    assert base.dtype == base.model.config.dtype == stored
    kept = base.model.state_dict()
    for name, value in load_file(base_copy / "model.safetensors").items():
        assert kept[name].dtype == stored
        assert torch.equal(kept[name], value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("one", "others", "loaded"),
    [
        (torch.float32, torch.bfloat16, "bfloat16 and float32, loaded in float32"),
        (torch.bfloat16, torch.float16, "bfloat16 and float16, loaded in float32"),
        (torch.float16, torch.float64, "float16 and float64, loaded in float64"),
    ],
)
def test_of_several_stored_precisions_none_is_rounded_and_one_line_says_so(
    base_copy, one, others, loaded, capsys
):
    def convert(tensors):
        tensors.update({name: value.to(one if name == NORM else others) for name, value in tensors.items()})

    change_tensors(base_copy, convert)
    kept = load(base_copy).model.state_dict()
    for name, value in load_file(base_copy / "model.safetensors").items():
        assert torch.equal(kept[name].double(), value.double())
    assert capsys.readouterr().err == f"{base_copy}: stored in {loaded}\n"


GOOD_START = 8
WEIGHTS = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-100],
    "cut_header": lambda data: data[:40],
    "huge_header": lambda data: struct.pack("<Q", 2**62) + data[GOOD_START:],
    "long_header": lambda data: struct.pack("<Q", 10**8) + data[GOOD_START:],
    "no_json": lambda data: data[:GOOD_START] + b"x" + data[GOOD_START + 1 :],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights(base_copy, name):
    path = base_copy / "model.safetensors"
    path.write_bytes(WEIGHTS[name](path.read_bytes()))
    assert_refused(base_copy, "model.safetensors: cannot be read: ")


def test_a_foreign_pickle_is_not_read(base_copy):
    torch.save(load_file(base_copy / "model.safetensors"), base_copy / "pytorch_model.bin")
    (base_copy / "model.safetensors").unlink()
    assert_refused(base_copy, r"has no model.safetensors; .*pytorch_model.bin, are not read: convert them")


def test_an_adapter_beside_the_base_is_not_loaded_in_silence(base_copy):
    (base_copy / "adapter_config.json").write_text("{}")
    assert_refused(base_copy, "has an adapter beside the base")


@pytest.fixture
def sharded(base_folder, base_copy) -> Path:
    (base_copy / "model.safetensors").unlink()
    BloomForCausalLM.from_pretrained(base_folder).save_pretrained(base_copy, max_shard_size="100KB")
    assert len(list(base_copy.glob("*.safetensors"))) > 1
    return base_copy


def test_shards_hold_the_same_base(base_folder, sharded):
    assert load(sharded).identity["fingerprint"] == load(base_folder).identity["fingerprint"]
    (sharded / "model-00001-of-00099.safetensors").write_bytes(b"not in the index, not read")
    load(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[]"])
def test_a_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert_refused(sharded, "model.safetensors.index.json: ")


def test_a_missing_shard(sharded):
    next(sharded.glob("*-00002-*.safetensors")).unlink()
    assert_refused(sharded, "00002")


def test_a_hub_model_in_the_download_cache(sharded, base_folder, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    repository = hub / "models--me--bloom"
    commit = "0123456789012345678901234567890123456789"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    sharded.rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = load("me/bloom", cache_dir=str(hub))
    assert base.identity["fingerprint"] == load(base_folder).identity["fingerprint"]
    change_json(repository / "snapshots" / commit / "config.json", n_layer=1)
    with pytest.raises(UserError, match=r"snapshots/.*safetensors: 2 layers are stored, .*n_layer 1"):
        load("me/bloom", cache_dir=str(hub))
    with pytest.raises(UserError, match="me/other: not a local folder, and it could not be downloaded"):
        load("me/other", cache_dir=str(hub))


def _bytes_that_a_cast_takes(folder: str) -> tuple[int, int]:
    """Bytes of the weights in float32, and the process's peak over what it holds before they are cast."""
    base = load(folder)
    size = sum(2 * parameter.nbytes for parameter in base.model.parameters())
    peak = process_memory.peak_over(
        lambda: patch_base(base, LoraConfig(), torch.device("cpu"), torch.float32)
    )
    return size, peak


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_stored_weights_leave_memory_while_they_are_cast(base_copy):
    config = BloomConfig(vocab_size=384, hidden_size=512, n_layer=12, n_head=8)
    BloomForCausalLM(config).half().save_pretrained(base_copy)
    size, peak = process_memory.in_fresh_process(_bytes_that_a_cast_takes, str(base_copy))
    assert size > 140 * 2**20
    # the stored half has been read for the fingerprint: while it stays, the peak is the whole size
    assert peak < 0.75 * size


def test_a_cast_keeps_every_value(base_copy):
    change_tensors(base_copy, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    base = load(base_copy)
    stored = {name: tensor.double() for name, tensor in base.model.state_dict().items()}
    model = patch_base(base, LoraConfig(), torch.device("cpu"), torch.float32)
    for name, tensor in stored.items():
        torch.testing.assert_close(model.state_dict()[name].double(), tensor, rtol=0, atol=0)
