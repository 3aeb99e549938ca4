"""What a process reads of a sharded base, and what it has to be."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from bloomft.config.keys import LoraConfig, TransformerConfig
from bloomft.errors import UserError
from bloomft.model.base import load_base, patch_base
from bloomft.model.patch import adapted_layers
from bloomft.model.sharding import held_bytes, is_sharded, shard_base, whole_stand_in
from tests.bloomft.launched import run_together

CPU = torch.device("cpu")


def loaded(folder, *, weights: bool):
    base = load_base(TransformerConfig(pretrained_model_name_or_path=str(folder)), weights=weights)
    torch.manual_seed(5)
    lora = LoraConfig(lora_dim=4, parts=["q", "v"])
    return base, patch_base(base, lora, CPU, torch.float32)


def compare(folder, *, cpu_offload: bool = False) -> None:
    _, whole = loaded(folder, weights=True)
    base, model = loaded(folder, weights=False)
    assert not is_sharded(model)
    shard_base(model, base.stored, CPU, cpu_offload=cpu_offload)
    assert is_sharded(model)
    parameters, size = dict(model.named_parameters()), torch.distributed.get_world_size()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    for name, parameter in whole.named_parameters():
        mine = parameters.pop(name)
        assert mine.requires_grad == parameter.requires_grad
        if parameter.requires_grad:
            assert torch.equal(mine, parameter)
            continue
        assert isinstance(mine, DTensor)
        assert held_bytes(mine) <= -(-len(parameter) // size) * parameter[:1].nbytes
        assert torch.equal(mine.full_tensor(), parameter)
    assert not parameters
    ids = torch.arange(40).view(2, 20) * 7 % 384
    losses = [one.train()(ids, labels=ids).loss for one in (model, whole)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, [each for each in one.parameters() if each.requires_grad])
        for loss, one in zip(losses, (model, whole), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_shards_may_stay_in_host_memory(base_folder):
    assert run_together(2, functools.partial(compare, base_folder, cpu_offload=True)) == [0, 0]


@pytest.mark.parametrize("size", [2, 3])
def test_every_process_holds_its_rows_and_the_adapters(base_folder, size):
    assert run_together(size, functools.partial(compare, base_folder)) == [0] * size


def test_files_without_the_prefix_in_several_dtypes_with_the_head_beside_the_embedding(base_copy):
    tensors = load_file(base_copy / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    renamed["lm_head.weight"] = renamed["word_embeddings.weight"].clone()
    # exact in both
    renamed["ln_f.bias"] = renamed["ln_f.bias"].bfloat16()
    save_file(renamed, base_copy / "model.safetensors", {"format": "pt"})
    assert run_together(2, functools.partial(compare, base_copy)) == [0, 0]


def test_an_identity_needs_no_weights_in_memory(base_folder):
    transformer = TransformerConfig(pretrained_model_name_or_path=str(base_folder))
    base, without = load_base(transformer), load_base(transformer, weights=False)
    assert without.identity == base.identity
    assert without.dtype == base.dtype
    assert all(parameter.is_meta for parameter in without.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.bias"), r"safetensors: lacks transformer.ln_f.bias"),
        (lambda tensors: tensors.update(odd=torch.zeros(3)), r"safetensors: has an unexpected .*odd \(1"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_what_is_missing_or_too_much_is_a_line(base_copy, change, message, weights):
    tensors = load_file(base_copy / "model.safetensors")
    change(tensors)
    save_file(tensors, base_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        loaded(base_copy, weights=weights)


def test_a_head_of_its_own_is_a_line(base_copy):
    described = json.loads((base_copy / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base_copy / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"its head is not the embedding; train.strategy=ddp can train it"):
        loaded(base_copy, weights=False)


def test_a_stand_in_has_the_shape_and_the_adapter_and_draws_no_random_number(base_folder):
    _, model = loaded(base_folder, weights=False)
    layer = next(iter(adapted_layers(model).values()))
    layer.backend = "aten"
    before = torch.get_rng_state()
    whole = whole_stand_in(layer.eval())
    assert torch.equal(before, torch.get_rng_state())
    assert whole.weight.shape == layer.weight.shape
    assert whole.bias.shape == layer.bias.shape
    assert (whole.weight.device, whole.weight.dtype) == (CPU, torch.float32)
    assert torch.equal(whole.lora_a, layer.lora_a)
    assert (whole.backend, whole.training, whole.parts) == ("aten", False, layer.parts)
