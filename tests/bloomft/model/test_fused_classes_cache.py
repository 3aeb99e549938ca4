"""A key-value cache takes the fused attention: the same text as without one, and no [T, T] memory."""

import pytest
import torch
from transformers import BloomForCausalLM, DynamicCache, StaticCache

from bloomft.model import fused_classes as fused_model
from bloomft.model.patch import fuse_bloom
from lorakernels.ops.alibi_attention import aten, plain
from lorakernels.tolerance import relative_error
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import CountCalls, plain_twin, tokens, with_trained_adapters
from tests.bloomft.plain_transformers import greedy_without_cache
from tests.lorakernels.largest_tensor import LargestTensor

GREEDY = {"do_sample": False, "pad_token_id": 3, "eos_token_id": None}


@pytest.fixture
def model() -> BloomForCausalLM:
    return tiny_model(n_layer=3).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 140, 300])
def test_greedy_text_is_that_of_the_uncached_model(model, dtype, length):
    model = with_trained_adapters(model.to(dtype)).eval()
    ids = tokens(2, length)
    expected = greedy_without_cache(model, ids, 24)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **GREEDY)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_are_those_of_the_uncached_model(dtype, monkeypatch):
    """A prompt, then token by token; transformers' attention is several times as far from it."""
    model = with_trained_adapters(tiny_model(n_layer=3, n_head=8, hidden_size=64).to(dtype)).eval()
    ids = tokens(4, 308)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.double()
        errors = []
        for plain_path in (False, True):
            if plain_path:
                monkeypatch.setattr(fused_model, "_only_grows", lambda cache: False)
            cache = DynamicCache()
            got = torch.cat([model(piece, cache=cache).logits for piece in ids.split([300] + 8 * [1], 1)], 1)
            errors.append(relative_error(got[:, 300:], expected[:, 300:]))
    # embedding, three layers of attention and feed-forward, and the head are rounded
    assert errors[0] < 8 * torch.finfo(dtype).eps / 4
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_writes_what_transformers_writes(model, beams):
    model = with_trained_adapters(model).eval()
    ids = tokens(2, 9)
    options = {"cache_implementation": "static", "max_new_tokens": 12, "num_beams": beams, **GREEDY}
    options["disable_compile"] = True
    mask = torch.ones_like(ids)
    expected = plain_twin(model).generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_a_static_cache_handed_in_by_a_caller(model):
    ids = tokens(1, 9)
    model = with_trained_adapters(model).eval()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :6], cache=cache).logits
        rest = model(ids[:, 6:], cache=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=1e-3, atol=1e-4)


def test_a_prompt_may_come_in_pieces(model):
    ids = tokens(2, 300)
    model = with_trained_adapters(model).eval()
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for piece in ids.split([5, 200, 1, 94], dim=1):
            parts.append(model(piece, cache=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-4)


def test_a_long_prompt_needs_no_square_memory():
    length = 20_000
    model = fuse_bloom(tiny_model(n_layer=1, n_head=1, hidden_size=8, vocab_size=400)).eval()
    ids = tokens(1, length)
    with LargestTensor() as seen, torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).cache
        model(ids[:, :1], cache=cache)
    assert seen.elements <= max(plain.QUERIES, aten.QUERIES) * (length + 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mask_is_made_once_a_batch(checkpointing):
    model = with_trained_adapters(tiny_model(n_layer=3)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 40)
    with CountCalls() as count:
        model(ids, labels=ids, document_ids=torch.arange(40).repeat(2, 1) // 10).loss.backward()
    assert count.calls["lorakernels.attention_mask.default"] == 1
    assert count.calls["lorakernels.alibi_attention.default"] == (6 if checkpointing else 3)
