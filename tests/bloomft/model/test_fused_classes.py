"""A fused model computes what transformers' BloomForCausalLM does, whatever it is called with."""

import weakref

import pytest
import torch
from torch import nn

from bloomft.model import fused_classes as fused_model
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.model.patch import patch_bloom
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import CountCalls, close, plain_twin, tokens, with_trained_adapters


def test_training_mode_has_no_logits_unless_asked(model):
    ids = tokens(2, 9)
    patch_bloom(model).train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape == (2, 9, 384)
    assert model(ids).logits.shape == (2, 9, 384)
    assert model.eval()(ids, labels=ids).logits.shape == (2, 9, 384)
    assert model(ids, labels=ids, skip_logits=True).logits is None


def test_num_items_in_batch_divides_the_sum(model):
    ids = tokens(2, 9)
    patch_bloom(model).train()
    mean = model(ids, labels=ids).loss
    close(model(ids, labels=ids, num_items_in_batch=4).loss, mean * 16 / 4, 1e-6)
    close(model(ids, labels=ids, num_items_in_batch=4, skip_logits=False).loss, mean * 16 / 4, 1e-6)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_masks_match(model, side):
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    {"left": mask[0, :5], "right": mask[0, 9:], "holes": mask[0, 3:6]}[side].zero_()
    patched = with_trained_adapters(model).eval()
    expected = plain_twin(patched)(ids, attention_mask=mask).logits
    for use_cache in (True, False):
        actual = patched(ids, attention_mask=mask, use_cache=use_cache).logits
        close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_cache_matches(model, beams):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    patched = with_trained_adapters(model).eval()
    options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "pad_token_id": 3}
    expected = plain_twin(patched).generate(ids, attention_mask=mask, **options)
    assert torch.equal(patched.generate(ids, attention_mask=mask, **options), expected)


def test_a_cache_is_taken_under_both_of_its_names(model):
    ids = tokens(1, 9)
    patched = with_trained_adapters(model).eval()
    expected = patched(ids).logits[:, -3:]
    for name in ("cache", "past_key_values"):
        first = patched(ids[:, :6], use_cache=True)
        close(patched(ids[:, 6:], **{name: first.cache}).logits, expected)


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_gradient_checkpointing_reaches_every_adapter(model, use_reentrant):
    ids = tokens(2, 11)
    with_trained_adapters(model).train()
    model(ids, labels=ids).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    options = () if use_reentrant is None else ({"use_reentrant": use_reentrant},)
    model.gradient_checkpointing_enable(*options)
    model(ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient, 1e-6)
        assert gradient.norm() > 0


def test_selective_checkpointing_repeats_the_cheap_and_keeps_the_expensive():
    model = with_trained_adapters(tiny_model()).train()
    ids = tokens(2, 32)
    repeated, gradients = {}, {}
    for mode in (False, "selective", True):
        model.zero_grad()
        checkpoint_blocks(model, mode)
        loss = model(ids, labels=ids).loss
        with CountCalls() as counter:
            loss.backward()
        repeated[mode] = [
            counter.calls[f"{name}.default"]
            for name in ("lorakernels.lora_linear_forward", "lorakernels.alibi_attention", "aten.gelu")
        ]
        gradients[mode] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert repeated == {False: [0, 0, 0], "selective": [0, 0, 2], True: [2, 2, 2]}
    for mode in ("selective", True):
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients[False], strict=True))


def test_results_of_layer_norms_do_not_wait_for_the_backward_pass(model):
    with_trained_adapters(model).train()
    results = []
    for block in model.transformer.h:
        # not on the layer norms: results of a module with hooks are kept
        for reader in (block.self_attention.query_key_value, block.mlp):
            reader.register_forward_pre_hook(lambda _module, inputs: results.append(weakref.ref(inputs[0])))
    loss = model(tokens(2, 32), labels=tokens(2, 32)).loss
    assert len(results) == 2 * len(model.transformer.h)
    assert loss.requires_grad
    assert all(result() is None for result in results)


def test_residuals_are_added_without_copies_of_gradients(model):
    with_trained_adapters(model).train()
    loss = model(tokens(2, 32), labels=tokens(2, 32)).loss
    with CountCalls() as counter:
        loss.backward()
    # what autograd does for an addition to a view
    assert not counter.calls["aten.as_strided.default"]
    assert not counter.calls["aten.new_empty_strided.default"]


def test_freed_memory_goes_back_only_where_a_backward_pass_will_follow(monkeypatch):
    calls = []
    monkeypatch.setattr(fused_model, "release_freed_memory", lambda: calls.append(1))
    model = with_trained_adapters(tiny_model(n_layer=fused_model.RELEASE_EVERY)).train()
    with torch.no_grad():
        model(tokens(1, 8), labels=tokens(1, 8))
    assert calls == []
    model(tokens(1, 8), labels=tokens(1, 8))
    assert calls == [1]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("target", ["dense", "dense_h_to_4h", "dense_4h_to_h"])
def test_selective_checkpointing_of_any_adapted_layer(target, dropout_p):
    model = with_trained_adapters(tiny_model(), target=target, dropout_p=dropout_p).train()
    ids = tokens(2, 32)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = {}
    for mode in (False, "selective"):
        checkpoint_blocks(model, mode)
        torch.manual_seed(0)
        gradients[mode] = torch.autograd.grad(model(ids, labels=ids).loss, adapters)
    assert all(torch.equal(a, b) for a, b in zip(gradients["selective"], gradients[False], strict=True))


@pytest.mark.parametrize("preserved", [True, False])
@pytest.mark.parametrize("mode", [True, "selective"])
def test_random_states_are_saved_where_they_are_asked_for(mode, preserved, monkeypatch):
    model = with_trained_adapters(tiny_model()).train()
    checkpoint_blocks(model, mode, preserve_rng_state=preserved)
    asked, state = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append(1) or state())
    model(tokens(2, 32), labels=tokens(2, 32)).loss.backward()
    assert bool(asked) == preserved


@pytest.mark.parametrize("extra", [{}, {"output_attentions": True}], ids=["fused", "eager"])
def test_packed_documents_equal_documents_one_by_one(model, extra):
    lengths = [5, 1, 9, 4]
    ids = tokens(1, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with_trained_adapters(model).eval()
    packed = model(ids, document_ids=document_ids, labels=ids, **extra)
    start, total, count = 0, 0.0, 0
    for length in lengths:
        alone = ids[:, start : start + length]
        single = model(alone, use_cache=False)
        close(packed.logits[:, start : start + length], single.logits)
        if length > 1:
            total += nn.functional.cross_entropy(single.logits[0, :-1], alone[0, 1:], reduction="sum").item()
            count += length - 1
        start += length
    assert packed.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_packed_documents_with_a_mask_equal_transformers_own_padding(model):
    ids = tokens(1, 12)
    document_ids = torch.tensor([[0] * 5 + [1] * 7])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 6:8] = 0
    with_trained_adapters(model).eval()
    packed = model(ids, document_ids=document_ids, attention_mask=mask).logits
    alone = model(ids[:, 5:], attention_mask=mask[:, 5:], use_cache=False).logits
    close(packed[0, 5:][mask[0, 5:].bool()], alone[0][mask[0, 5:].bool()])


def test_documents_and_a_cache_are_refused(model):
    ids = tokens(1, 6)
    patch_bloom(model).eval()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)


def test_attention_dropout_takes_transformers_path_and_follows_the_seed():
    model = patch_bloom(tiny_model(attention_dropout=0.3)).train()
    ids = tokens(1, 16)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_hidden_states_attentions_and_tuples_match(model):
    ids = tokens(2, 8)
    patched = with_trained_adapters(model).eval()
    twin = plain_twin(patched)
    options = {"output_hidden_states": True, "use_cache": False}
    for more in ({}, {"output_attentions": True}):
        expected, actual = twin(ids, **options, **more), patched(ids, **options, **more)
        assert len(actual.hidden_states) == len(expected.hidden_states)
        for mine, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
            close(mine, theirs)
    for mine, theirs in zip(actual.attentions, expected.attentions, strict=True):
        close(mine, theirs)
    as_tuple = patched(ids, labels=ids, return_dict=False, use_cache=False)
    close(as_tuple[1], twin(ids, labels=ids, return_dict=False, use_cache=False)[1])
