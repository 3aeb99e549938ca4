"""Every way to save a patched model keeps its adapters."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomForCausalLM
from transformers.utils.hub import PushToHubMixin

from bloomft.errors import UserError
from bloomft.model.patch import adapter_state, fuse_bloom, patch_bloom, unpatch_bloom
from bloomft.model.peft_format import load_peft_adapter, load_peft_config
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import close, tokens, trainer, with_trained_adapters
from tests.bloomft.peft_models import load_with_peft

IDS = tokens(2, 12)


@pytest.fixture
def patched(base_folder) -> BloomForCausalLM:
    return with_trained_adapters(BloomForCausalLM.from_pretrained(base_folder)).eval()


def assert_loads(folder: Path, patched, base_folder) -> None:
    expected = patched(IDS).logits
    for loaded in (
        AutoModelForCausalLM.from_pretrained(folder),
        BloomForCausalLM.from_pretrained(folder),
        load_with_peft(base_folder, folder),
    ):
        close(loaded.eval()(IDS).logits, expected)
    again = patch_bloom(BloomForCausalLM.from_pretrained(base_folder), r=4, scale=2.0)
    assert load_peft_config(folder).lora_scale == 2.0
    load_peft_adapter(again, folder)
    assert all(
        torch.equal(value, adapter_state(patched)[name]) for name, value in adapter_state(again).items()
    )


@pytest.mark.parametrize("parts", [None, ["q", "v"]])
def test_save_pretrained_keeps_the_adapters(base_folder, tmp_path, parts):
    patched = with_trained_adapters(BloomForCausalLM.from_pretrained(base_folder), parts=parts).eval()
    patched.save_pretrained(tmp_path / "new" / "folder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder").eval()
    close(loaded(IDS).logits, patched(IDS).logits)


def test_checkpoints_of_a_real_trainer_keep_the_adapters(patched, base_folder, tmp_path):
    run = trainer(patched, tmp_path, {"save_strategy": "steps", "save_steps": 1})
    run.train()
    run.save_model(tmp_path / "final")
    patched.eval()
    assert_loads(tmp_path / "final", patched, base_folder)
    assert_loads(tmp_path / "checkpoint-2", patched, base_folder)
    with pytest.raises(AssertionError):
        assert_loads(tmp_path / "checkpoint-1", patched, base_folder)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_dict_of_the_model_s_own_is_understood(patched, base_folder, tmp_path, compiled):
    module = torch.compile(patched, backend="eager") if compiled else patched
    module.save_pretrained(tmp_path, state_dict=module.state_dict())
    assert_loads(tmp_path, patched, base_folder)
    other = {name: value + 1 for name, value in patched.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict: "):
        patched.save_pretrained(tmp_path, state_dict=other)


def test_push_to_hub_uploads_the_adapters(patched, base_folder, tmp_path, monkeypatch):
    class Hub:
        repo_id = "me/mine"

        def create_repo(self, *_, **__):
            return self

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    def upload(self, folder, *_, **__):
        Path(folder).rename(tmp_path / "uploaded")
        Path(folder).mkdir()

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    patched.push_to_hub("me/mine")
    assert_loads(tmp_path / "uploaded", patched, base_folder)


def test_a_base_without_a_name_is_never_loaded_bare(tmp_path):
    patched = with_trained_adapters(tiny_model()).eval()
    patched.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        BloomForCausalLM.from_pretrained(tmp_path)
    base = unpatch_bloom(with_trained_adapters(tiny_model())).eval()
    close(PeftModel.from_pretrained(base, tmp_path).eval()(IDS).logits, patched(IDS).logits)


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"state_dict": {"a": 1}}, {"variant": "fp16"}])
def test_options_that_an_adapter_cannot_follow_are_refused(patched, tmp_path, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}: .*unpatch_bloom\(model, merge=True\)"):
        patched.save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_other_processes_write_nothing_and_an_unwritable_folder_is_named(patched, tmp_path):
    patched.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file: cannot write"):
        patched.save_pretrained(tmp_path / "file")


def test_a_fused_model_without_adapters_saves_as_transformers_own(base_folder, tmp_path):
    model = fuse_bloom(BloomForCausalLM.from_pretrained(base_folder)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BloomForCausalLM"]
    close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


def test_a_whole_pickled_model_keeps_its_adapters(patched):
    again = pickle.loads(pickle.dumps(patched))
    assert type(again) is type(patched)
    assert torch.equal(again(IDS).logits, patched(IDS).logits)
