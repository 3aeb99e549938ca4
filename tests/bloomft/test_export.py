"""Exports that other programs load: transformers the merged folder, PEFT the adapter."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomForCausalLM

from bloomft import export as export_module
from bloomft.config.keys import LoraConfig
from bloomft.config.loading import load_config
from bloomft.data.loading import load_data
from bloomft.errors import UserError
from bloomft.export import export, main
from bloomft.model.base import load_base
from bloomft.model.patch import adapter_state, patch_bloom
from bloomft.model.peft_format import adapted_layers, load_peft_adapter, load_peft_config
from bloomft.run.checkpoint import load_checkpoint, save_checkpoint
from bloomft.run.trained_model import load_trained
from lorakernels.tolerance import relative_error
from tests.bloomft.peft_models import load_with_peft
from tests.bloomft.plain_transformers import heldout_loss

IDS = torch.randint(4, 384, (3, 24), generator=torch.Generator().manual_seed(3))


def test_merged_and_peft_agree_with_the_trained_model(trained, base_folder, tmp_path, capsys):
    path, run_dir = trained
    main([str(path), "last.ckpt"])
    printed = capsys.readouterr().out
    assert "logits moved by at most" in printed
    assert "held-out loss" in printed
    main([str(path), "last.ckpt", "--format", "adapter", "--output", str(tmp_path / "peft")])

    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged").eval()
    assert type(merged) is BloomForCausalLM
    assert merged.config.architectures == ["BloomForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "merged")
    assert (
        tokenizer("pip install")["input_ids"]
        == AutoTokenizer.from_pretrained(base_folder)("pip install")["input_ids"]
    )
    peft = load_with_peft(base_folder, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    config = load_config(path)
    base_of_the_run, state = load_base(config.model.transformer), load_checkpoint(run_dir / "last.ckpt")
    trained_model = load_trained(base_of_the_run, state, path, torch.device("cpu"))
    with torch.no_grad():
        expected = trained_model(IDS).logits
        assert relative_error(merged(IDS).logits, expected) < 1e-5
        assert relative_error(peft(IDS).logits, merged(IDS).logits) < 1e-4
        assert relative_error(base(IDS).logits, expected) > 1e-2, (
            "the adapters must matter for this to mean anything"
        )


def test_merging_in_float32_leaves_the_loss_of_packed_documents(trained, tmp_path):
    path, run_dir = trained
    # Several documents in a held-out row: a merged model that attended across them would show here.
    config = load_config(path, ["data.heldout_fraction=0.5", "data.max_length=128"])
    shift = export(config, run_dir / "last.ckpt", tmp_path / "out", "merged")
    assert shift.merged_loss == pytest.approx(shift.unmerged_loss, rel=1e-6)
    assert shift.logits < 1e-4 * shift.logits_scale


def test_half_precision_base_is_merged_in_float32_and_kept_in_its_dtype(
    run, tmp_path, base_folder, base_copy
):
    AutoModelForCausalLM.from_pretrained(base_folder).to(torch.bfloat16).save_pretrained(base_copy)
    run_dir = run(model__transformer__pretrained_model_name_or_path=str(base_copy)).run_dir
    config = load_config(tmp_path / "run.yaml")
    shift = export(config, run_dir / "last.ckpt", tmp_path / "out", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert 0 < shift.logits < 0.1 * shift.logits_scale
    assert abs(shift.merged_loss - shift.unmerged_loss) < 0.02
    heldout = load_data(config.data, load_base(config.model.transformer).tokenizer).heldout
    assert shift.transformers_loss == pytest.approx(heldout_loss(merged.eval(), heldout), rel=1e-5)

    state = load_checkpoint(run_dir / "last.ckpt").adapters
    name = "transformer.h.1.self_attention.query_key_value"
    base = AutoModelForCausalLM.from_pretrained(base_copy, dtype="auto")
    weight = base.get_parameter(f"{name}.weight").double()
    exact = weight + 2.0 * state[f"{name}.lora_b"].double() @ state[f"{name}.lora_a"].double()
    rounded_once = merged.get_parameter(f"{name}.weight")
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((rounded_once.double() - exact).abs() <= 0.51 * ulp + 1e-30).all()


def test_parts_are_exported_as_full_rows(run, base_folder, tmp_path):
    run(model__lora__parts=["q", "v"])
    path = tmp_path / "run.yaml"
    main([str(path), "last.ckpt", "--format", "adapter", "--output", str(tmp_path / "peft")])
    main([str(path), "last.ckpt", "--output", str(tmp_path / "merged")])
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = tensors["base_model.model.transformer.h.0.self_attention.query_key_value.lora_B.weight"]
    assert rows.view(4, 3, 12, 4).abs().sum((0, 2, 3))[1] == 0
    peft = load_with_peft(base_folder, tmp_path / "peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative_error(peft(IDS).logits, merged(IDS).logits) < 1e-5


def test_our_own_reader_of_peft_s_format(trained, tmp_path):
    path, run_dir = trained
    main([str(path), "last.ckpt", "--format", "adapter"])
    lora = load_peft_config(run_dir / "adapter")
    assert lora == LoraConfig(lora_dim=4, lora_scale=2.0, attention_layer_name="query_key_value")
    model = patch_bloom(load_base(load_config(path).model.transformer).model, r=4, scale=2.0)
    load_peft_adapter(model, run_dir / "adapter")
    state = load_checkpoint(run_dir / "last.ckpt").adapters
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(model).items())
    narrow = patch_bloom(load_base(load_config(path).model.transformer).model, r=2)
    with pytest.raises(UserError, match=r"lora_A.weight is of shape \(4, 48\); expected \(2, 48\)"):
        load_peft_adapter(narrow, run_dir / "adapter")
    wide = patch_bloom(load_base(load_config(path).model.transformer).model, r=8, scale=3.0)
    load_peft_adapter(wide, run_dir / "adapter")
    for ours, theirs in zip(adapted_layers(wide).values(), adapted_layers(model).values(), strict=True):
        torch.testing.assert_close(ours.delta_weight(), theirs.delta_weight(), rtol=1e-5, atol=1e-7)


def test_an_export_replaces_an_export_and_nothing_else(trained, tmp_path):
    path, run_dir = trained
    main([str(path), "last.ckpt"])
    main([str(path), "step-6.ckpt"])
    assert json.loads((run_dir / "merged" / "bloomft_export.json").read_text())["step"] == 6
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        main([str(path), "last.ckpt", "--output", str(foreign)])
    assert (foreign / "thesis.tex").read_text() == "irreplaceable"
    assert not [p for p in run_dir.iterdir() if p.name.startswith(".")]


def test_a_file_of_the_user_s_in_an_earlier_export_is_kept(trained, tmp_path):
    path, _ = trained
    output = tmp_path / "out"
    main([str(path), "last.ckpt", "--output", str(output)])
    (output / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"out: notes.md: not written by the earlier export"):
        main([str(path), "last.ckpt", "--output", str(output)])
    assert (output / "notes.md").read_text() == "mine"
    (output / "notes.md").unlink()
    main([str(path), "last.ckpt", "--output", str(output), "--format", "adapter"])
    assert not (output / "model.safetensors").exists()
    (output / "bloomft_export.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        main([str(path), "last.ckpt", "--output", str(output)])


def test_an_export_through_a_symbolic_link(trained, tmp_path):
    path, _ = trained
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        main([str(path), "last.ckpt", "--output", str(tmp_path / "link"), "--format", "adapter"])
    assert (tmp_path / "link").is_symlink()
    assert [found.name for found in (tmp_path / "disk").iterdir()] == ["real"]


def test_folders_that_hold_something_else_are_no_output(trained, tmp_path, base_folder, monkeypatch):
    path, run_dir = trained
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for output in (".", "/", str(tmp_path), str(run_dir), str(base_folder)):
        with pytest.raises(UserError, match=f"--output {output}: the export would replace"):
            main([str(path), "last.ckpt", "--output", output])
    assert (run_dir / "last.ckpt").exists()


def test_an_output_that_cannot_be_written_is_found_before_the_base_is_loaded(trained, tmp_path, monkeypatch):
    path, _ = trained
    monkeypatch.setattr(export_module, "load_base", lambda _: pytest.fail("a base was loaded"))
    for output, reason in ((path / "x", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=reason):
            main([str(path), "last.ckpt", "--output", str(output)])


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_what_is_not_finite_is_not_exported(trained, kind):
    path, run_dir = trained
    state = load_checkpoint(run_dir / "last.ckpt")
    next(iter(state.adapters.values()))[0, 0] = torch.nan
    save_checkpoint(state, run_dir, keep=False)
    with pytest.raises(UserError, match=r"last.ckpt: .*no run writes such a value of 'adapters'"):
        main([str(path), "last.ckpt", "--format", kind])
    assert not (run_dir / kind).exists()


def test_a_merge_that_overflows_is_not_exported(trained, monkeypatch):
    path, run_dir = trained
    state = load_checkpoint(run_dir / "last.ckpt")
    for value in state.adapters.values():
        value.fill_(1e25)
    monkeypatch.setattr(export_module, "load_checkpoint", lambda _: state)
    with pytest.raises(UserError, match=r"last.ckpt: \w+ is (nan|inf) after merging; nothing"):
        main([str(path), "last.ckpt"])
    assert not (run_dir / "merged").exists()


def test_a_full_disk_is_one_line(trained, monkeypatch):
    path, run_dir = trained
    main([str(path), "step-6.ckpt"])

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match=r"merged: cannot be written: .*No space left"):
        main([str(path), "last.ckpt"])
    assert json.loads((run_dir / "merged" / "bloomft_export.json").read_text())["step"] == 6


def test_export_without_the_training_text(trained, corpus, tmp_path, capsys):
    path, _ = trained
    for file in corpus.iterdir():
        file.unlink()
    main([str(path), "last.ckpt", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "held-out loss is not compared" in printed
    assert "logits moved by at most" in printed
