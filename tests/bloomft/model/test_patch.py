"""Patching changes no result and can be undone; adapters start, train and travel as LoRA says."""

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, BloomModel

from bloomft.model.patch import (
    adapted_layers,
    adapter_state,
    fuse_bloom,
    is_patched,
    load_adapter_state,
    patch_bloom,
    unfuse_bloom,
    unpatch_bloom,
)
from tests.bloomft.model.conftest import close, plain_twin, tokens, with_trained_adapters


def test_fresh_adapters_change_nothing(model):
    ids = tokens(2, 17)
    expected = model.eval()(ids, labels=ids)
    patch_bloom(model)
    actual = model(ids, labels=ids)
    close(actual.logits, expected.logits)
    close(actual.loss, expected.loss)
    assert actual.cache is not None


def test_loss_and_adapter_gradients_match_plain_transformers(model):
    ids = tokens(2, 19)
    labels = ids.clone()
    labels[0, :7] = -100
    patched = with_trained_adapters(model).train()
    reference = unpatch_bloom(copy.deepcopy(patched)).train()
    adapters = {}
    for name, layer in adapted_layers(patched).items():
        linear = reference.get_submodule(name)
        adapters[name] = [layer.lora_a.detach().clone(), layer.lora_b.detach().clone()]
        [value.requires_grad_() for value in adapters[name]]
        linear.register_forward_hook(
            lambda module, inputs, output, name=name: (
                output + 2.0 * (inputs[0] @ adapters[name][0].T) @ adapters[name][1].T
            )
        )
    loss = patched(ids, labels=labels).loss
    loss.backward()
    expected = reference(ids, labels=labels).loss
    expected.backward()
    close(loss, expected, 1e-6)
    for name, layer in adapted_layers(patched).items():
        close(layer.lora_a.grad, adapters[name][0].grad, 1e-4)
        close(layer.lora_b.grad, adapters[name][1].grad, 1e-4)


def test_unpatching_restores_the_original_bit_for_bit(model):
    model.transformer.h[0].mlp.dense_h_to_4h.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = model.transformer.h[0].self_attention.query_key_value.weight.data_ptr()
    trainable = [name for name, value in model.named_parameters() if value.requires_grad]
    classes = [type(module) for module in model.modules()]
    with_trained_adapters(model)
    assert is_patched(model)
    assert model.transformer.h[0].self_attention.query_key_value.weight.data_ptr() == storage
    unpatch_bloom(model)
    assert not is_patched(model)
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, value in model.named_parameters() if value.requires_grad] == trainable
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.transformer.h[0].self_attention.query_key_value.weight.data_ptr() == storage


def test_merging_keeps_the_function(model):
    ids = tokens(2, 10)
    with_trained_adapters(model).eval()
    expected = model(ids).logits
    close(unpatch_bloom(model, merge=True)(ids).logits, expected)
    assert type(model) is BloomForCausalLM


def test_save_pretrained_of_the_unpatched_model(model, tmp_path):
    ids = tokens(1, 8)
    unpatch_bloom(with_trained_adapters(model).eval(), merge=True).save_pretrained(tmp_path)
    loaded = BloomForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("parts", [["q"], ["v", "q"], ["k", "v"]])
def test_parts_adapt_only_their_rows_of_every_head(model, parts):
    with_trained_adapters(model, parts=parts)
    heads, width = model.config.n_head, model.config.hidden_size
    for layer in adapted_layers(model).values():
        changed = layer.delta_weight().view(heads, 3, width // heads, width).abs().sum((0, 2, 3)) > 0
        assert changed.tolist() == [name in parts for name in "qkv"]
        assert layer.lora_b.shape == (len(parts) * width, 4)
    ids = tokens(1, 9)
    close(model.eval()(ids).logits, plain_twin(model)(ids).logits)


def test_only_adapters_train_and_both_start_as_lora_says(model):
    patch_bloom(model, r=4)
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
    }
    for layer in adapted_layers(model).values():
        assert not layer.lora_b.any()
        assert layer.lora_a.std() > 0
        assert layer.lora_a.dtype == torch.float32


def test_half_precision_base_keeps_float32_adapters(model):
    patch_bloom(model.to(torch.bfloat16)).train()
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert torch.isfinite(loss)


def test_adapter_state_travels(model):
    state = {name: value.clone() for name, value in adapter_state(with_trained_adapters(model)).items()}
    fresh = patch_bloom(unpatch_bloom(model), r=4, scale=2.0)
    load_adapter_state(fresh, state)
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(fresh).items())
    with pytest.raises(ValueError, match=r"lora_a has shape \(4, 48\)"):
        load_adapter_state(patch_bloom(unpatch_bloom(fresh), r=8), state)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        load_adapter_state(patch_bloom(unpatch_bloom(fresh), r=4), state)


def test_misuse_is_named(model):
    with pytest.raises(ValueError, match="not patched"):
        unpatch_bloom(model)
    with pytest.raises(ValueError, match=r"no linear layer is called 'qkv'; there are: .*query_key_value"):
        patch_bloom(model, target="qkv")
    assert not is_patched(model)
    with pytest.raises(ValueError, match="r: expected"):
        patch_bloom(model, r=0)
    with pytest.raises(ValueError, match="'lm_head' cannot have an adapter"):
        patch_bloom(model, target="lm_head")
    with pytest.raises(ValueError, match="scale: expected a number other than 0"):
        patch_bloom(model, scale=0.0)
    with pytest.raises(ValueError, match="rows of query_key_value"):
        patch_bloom(model, target="dense", parts=["q"])
    assert not is_patched(model)
    patch_bloom(model)
    with pytest.raises(ValueError, match="unpatch_bloom"):
        patch_bloom(model)
    with pytest.raises(TypeError, match="BloomForCausalLM"):
        patch_bloom(BloomModel(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)))


def test_other_targets(model):
    ids = tokens(1, 9)
    with_trained_adapters(model, target="dense_4h_to_h").eval()
    assert len(adapted_layers(model)) == 2
    close(model(ids).logits, plain_twin(model)(ids).logits)


def test_fusing_alone_trains_every_weight(model):
    ids = tokens(2, 9)
    model.train()(ids, labels=ids).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    fuse_bloom(model)(ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient, 1e-4)
    assert type(unfuse_bloom(model)) is BloomForCausalLM
