"""A base is the one that was asked for, whole, or one line that names the file."""

import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM

from bloomft.config.keys import TransformerConfig
from bloomft.errors import UserError
from bloomft.model import base_files
from bloomft.model.base import load_base
from bloomft.model.base_files import fingerprint, remembered_fingerprint
from tests.bloomft.conftest import tiny_model


@pytest.fixture
def folder(base_folder, tmp_path) -> Path:
    """A copy of the base to damage."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def load(folder, **options):
    return load_base(TransformerConfig(pretrained_model_name_or_path=str(folder), **options))


def fail(folder, expected: str) -> None:
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
def test_other_tensors_than_the_configuration_s(folder, name):
    change, expected = TENSORS[name]
    change_tensors(folder, change)
    fail(folder, expected)


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
def test_a_configuration_that_does_not_fit_its_tensors(folder, name):
    changes, expected = SETTINGS[name]
    change_json(folder / "config.json", **changes)
    fail(folder, expected)


@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", "[" * 100_000, "\0"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_no_object(folder, file, text):
    (folder / file).write_text(text)
    fail(folder, f"{file}: ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_empty_object(folder, file):
    (folder / file).write_text("{}")
    fail(folder, f"{file}: ")


def test_a_tokenizer_of_another_model(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(content))
    fail(folder, "the tokenizer has token 1000000, the model tokens below 384")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "said", [{"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float64"}, {}]
)
def test_the_stored_precision_is_kept_whatever_the_configuration_says(folder, stored, said, capsys):
    change_tensors(folder, lambda t: t.update({name: value.to(stored) for name, value in t.items()}))
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("dtype", None)
    path.write_text(json.dumps(settings | said))
    base = load(folder)
    assert base.dtype == base.model.config.dtype == stored
    kept = base.model.state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
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
    folder, one, others, loaded, capsys
):
    def convert(tensors):
        tensors.update({name: value.to(one if name == NORM else others) for name, value in tensors.items()})

    change_tensors(folder, convert)
    kept = load(folder).model.state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(kept[name].double(), value.double())
    assert capsys.readouterr().err == f"{folder}: stored in {loaded}\n"


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
def test_damaged_weights(folder, name):
    path = folder / "model.safetensors"
    path.write_bytes(WEIGHTS[name](path.read_bytes()))
    fail(folder, "model.safetensors: cannot be read: ")


def test_a_foreign_pickle_is_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    fail(folder, r"has no model.safetensors; .*pytorch_model.bin, are not read: convert them")


def test_an_adapter_beside_the_base_is_not_loaded_in_silence(folder):
    (folder / "adapter_config.json").write_text("{}")
    fail(folder, "has an adapter beside the base")


@pytest.fixture
def sharded(base_folder, tmp_path) -> Path:
    folder = Path(shutil.copytree(base_folder, tmp_path / "sharded"))
    (folder / "model.safetensors").unlink()
    BloomForCausalLM.from_pretrained(base_folder).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_shards_hold_the_same_base(base_folder, sharded):
    assert load(sharded).identity["fingerprint"] == load(base_folder).identity["fingerprint"]
    (sharded / "model-00001-of-00099.safetensors").write_bytes(b"not in the index, not read")
    load(sharded)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[]"])
def test_a_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    fail(sharded, "model.safetensors.index.json: ")


def test_a_missing_shard(sharded):
    next(sharded.glob("*-00002-*.safetensors")).unlink()
    fail(sharded, "00002")


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


def test_every_byte_is_in_the_fingerprint():
    model = tiny_model()
    before = fingerprint(model)
    assert fingerprint(tiny_model()) == before
    for parameter in model.parameters():
        middle = (
            parameter.detach().view(-1).view(torch.int32)[parameter.numel() // 3 : parameter.numel() // 3 + 1]
        )
        middle ^= 1
        assert fingerprint(model) != before
        middle ^= 1
    assert fingerprint(model) == before
    model.config.layer_norm_epsilon *= 2
    assert fingerprint(model) != before


def test_every_dtype_has_a_fingerprint_of_its_own():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert len({fingerprint(tiny_model().to(dtype)) for dtype in dtypes}) == len(dtypes)


def test_a_fingerprint_is_remembered_until_a_file_changes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base_files, "REMEMBERED_FROM", 0)
    made = []
    real = base_files.fingerprint
    monkeypatch.setattr(base_files, "fingerprint", lambda model: made.append(1) or real(model))
    file, cache = folder / "model.safetensors", tmp_path / "cache"
    model = BloomForCausalLM.from_pretrained(folder)

    def again() -> tuple[str, int]:
        made.clear()
        return remembered_fingerprint(model, [file], cache), len(made)

    long_ago, soon = (time.time_ns() + seconds * 10**9 for seconds in (-10, 1000))
    os.utime(file, ns=(soon, soon))
    assert again() == (real(model), 1)
    assert again() == (real(model), 1), "a file written this very moment may change unseen"
    os.utime(file, ns=(long_ago, long_ago))
    assert [again(), again(), again()] == [(real(model), 1), (real(model), 0), (real(model), 0)]
    next(cache.iterdir()).write_text("damaged")
    assert [again()[1], again()[1]] == [1, 0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(long_ago, long_ago))
    model = BloomForCausalLM.from_pretrained(folder)
    assert again() == (real(model), 1), "same path, size and modification time, other bytes"
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert again() == (real(model), 1)
