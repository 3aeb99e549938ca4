"""Generation from the base, a checkpoint and exported folders."""

import json
import logging
import shutil
import warnings

import pytest
import torch
import transformers
from transformers import BloomForCausalLM, TextStreamer

from bloomft import export
from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.generate import generate, main
from bloomft.run.generation import Sampling, load_for_generation
from bloomft.train import train
from tests.bloomft.conftest import tiny_model


@pytest.fixture
def say(capsys):
    def say(*arguments: str) -> str:
        capsys.readouterr()
        main([*arguments, "--prompt", "# Usage", "--max-new-tokens", "12"])
        return capsys.readouterr().out

    return say


@pytest.fixture
def trained(settings, config_path):
    settings["optim"]["scheduler"]["num_training_steps"] = 20
    path = config_path(settings)
    return str(path), train(load_config(path)).run_dir


def test_same_seed_same_text_everywhere(trained, say):
    path, run_dir = trained
    base, tuned = say(path), say(path, "last.ckpt")
    assert base.startswith("# Usage")
    assert say(path) == base
    assert say(path, "last.ckpt") == tuned != base
    assert say(path, "last.ckpt", "--seed", "1") != tuned
    export.main([path, "last.ckpt"])
    export.main([path, "last.ckpt", "--format", "adapter"])
    greedy = say(path, "last.ckpt", "--temperature", "0")
    assert say(str(run_dir / "merged"), "--temperature", "0") == greedy
    assert say(path, "merged", "--temperature", "0") == greedy
    assert say(path, "adapter", "--temperature", "0") == greedy


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "many"], "invalid int value"),
        (["absent.ckpt"], "no checkpoint at absent.ckpt"),
        (["train.batch_size=x"], "command line: train.batch_size"),
    ],
)
def test_mistakes(settings, config_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        main([str(config_path(settings)), "--prompt", "x", *arguments])


def test_a_missing_or_empty_prompt(settings, config_path):
    with pytest.raises(UserError, match="--prompt"):
        main([str(config_path(settings))])
    with pytest.raises(UserError, match="at least one character"):
        main([str(config_path(settings)), "--prompt", ""])


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
def model_with(base_folder, tmp_path):
    """Loads a base, whose likeliest tokens vary, with a generation_config.json of these values."""
    folder = tmp_path / "with_generation_config"
    shutil.copytree(base_folder, folder)
    tiny_model(1, tie_word_embeddings=False).save_pretrained(folder)

    def load(settings: dict):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return load_for_generation(str(folder), None)

    return load


def likeliest(model, tokenizer, count: int) -> list[int]:
    """The definition of greedy text: the largest logit, the whole text again for every token."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, start:].tolist()


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


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_an_export_is_read_with_its_own_base_alone(trained, say, base_folder, tmp_path, kind):
    path, _ = trained
    export.main([path, "last.ckpt", "--format", kind])
    other = tmp_path / "other base"
    shutil.copytree(base_folder, other)
    model = BloomForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] += 1
    model.save_pretrained(other)
    with pytest.raises(UserError, match="base"):
        say(path, kind, f"model.transformer.pretrained_model_name_or_path={other}")
    assert say(path, kind).startswith("# Usage")
