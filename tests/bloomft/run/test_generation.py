"""What the base's own settings of generation may change, and what is loaded to generate."""

import json
import logging
import warnings

import pytest
import torch
import transformers
from transformers import BloomForCausalLM, TextStreamer

from bloomft import export
from bloomft.errors import UserError
from bloomft.model.fused_classes import FusedBloomForCausalLM, FusedBloomModel
from bloomft.model.patch import unfuse_bloom
from bloomft.run.generation import Sampling, generate, load_for_generation
from tests.bloomft.conftest import tiny_model
from tests.bloomft.plain_transformers import greedy_without_cache

PROMPT = "# Usage"


GENERATION_CONFIGS = {
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "contrastive_search": {"penalty_alpha": 0.6, "top_k": 4},
    "sampling": {"do_sample": True, "temperature": 7.0, "top_k": 1, "top_p": 0.1},
    "other_sampling": {"do_sample": True, "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5},
    "sampling_flags_beside_greedy": {"do_sample": False, "temperature": 0.3, "top_p": 0.2},
    "repetition": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    "lengths": {"min_length": 60, "min_new_tokens": 60, "max_length": 3},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 2},
    "suppressed": {"suppress_tokens": list(range(4, 200)), "begin_suppress_tokens": [250]},
    "biased": {"sequence_bias": [[[11], 90.0]], "bad_words_ids": [[30], [31]]},
    "stop_strings": {"stop_strings": ["e", " "]},
    "several_outputs": {"num_return_sequences": 2, "do_sample": True},
    "dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "caches": {"use_cache": False, "cache_implementation": "static"},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": {"bias": 90.0}},
    "time": {"max_time": 0.0},
    "healing": {"token_healing": True},
}


@pytest.fixture
def model_with(base_copy):
    """Loads a base, whose likeliest tokens vary, with a generation_config.json of these values."""
    tiny_model(1, tie_word_embeddings=False).save_pretrained(base_copy)

    def load(settings: dict):
        (base_copy / "generation_config.json").write_text(json.dumps(settings))
        return load_for_generation(str(base_copy), None)

    return load


def likeliest(model, tokenizer, count: int) -> list[int]:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return greedy_without_cache(model, ids, count)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", GENERATION_CONFIGS)
def test_only_ends_of_text_come_from_the_base(model_with, name, caplog, capsys, monkeypatch):
    plain, tokenizer = model_with({})
    greedy, drawn = Sampling(16, temperature=0), Sampling(16, temperature=0.9, top_p=0.8, seed=3)
    expected = [
        tokenizer.decode(likeliest(plain, tokenizer, 16), skip_special_tokens=True),
        generate(plain, tokenizer, PROMPT, drawn),
    ]
    model, tokenizer = model_with(GENERATION_CONFIGS[name])
    before = model.generation_config.to_dict()
    transformers_logger = transformers.logging.get_logger("transformers")
    monkeypatch.setattr(transformers_logger, "propagate", True)
    monkeypatch.setattr(transformers_logger, "level", logging.WARNING)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampling, text in zip((greedy, drawn), expected, strict=True):
            capsys.readouterr()
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            assert generate(model, tokenizer, PROMPT, sampling, streamer) == text
            assert capsys.readouterr().out == text + "\n"
    assert caplog.messages == []
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("several", [True, False])
def test_the_first_of_several_ends_of_text_ends_it(model_with, several):
    model, tokenizer = model_with({})
    written = likeliest(model, tokenizer, 16)
    third = next(token for token in written if written.index(token) >= 3)
    model, tokenizer = model_with({"eos_token_id": [383, third, 10**6, -1] if several else third})
    text = generate(model, tokenizer, PROMPT, Sampling(16, temperature=0))
    assert text == tokenizer.decode(written[: written.index(third) + 1], skip_special_tokens=True)


def test_the_end_of_text_that_training_adds_always_ends_it(model_with):
    model, tokenizer = model_with({"eos_token_id": 383})
    with torch.no_grad():  # answers everything with the tokenizer's end of text
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1.0
        model.transformer.ln_f.bias.fill_(9.0)
    written = []
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    streamer.put = lambda value: written.extend(value.flatten().tolist())
    assert generate(model, tokenizer, PROMPT, Sampling(16, temperature=0), streamer) == ""
    assert written[len(tokenizer(PROMPT)["input_ids"]) :] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("ends", ["</s>", [2, "x"], [[2]], 2.5, True, {"id": 2}])
def test_ends_of_text_that_are_no_token_ids(model_with, ends):
    with pytest.raises(UserError, match=r"generation_config.json: .*eos_token_id") as caught:
        generate(*model_with({"eos_token_id": ends}), PROMPT, Sampling(2))
    assert "\n" not in str(caught.value)


def test_the_base_and_exported_folders_are_fused(trained):
    path, run_dir = map(str, trained)
    export.main([path, "last.ckpt"])
    for arguments in ((path, None), (path, "merged"), (f"{run_dir}/merged", None)):
        model, _ = load_for_generation(*arguments)
        assert type(model) is FusedBloomForCausalLM
        assert type(model.transformer) is FusedBloomModel
        assert type(unfuse_bloom(model)) is BloomForCausalLM
