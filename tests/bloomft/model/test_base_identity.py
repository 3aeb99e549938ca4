"""What a run or an export leaves names its base, and is not put on another one."""

import json

import pytest
from peft import PeftConfig

from bloomft.config.keys import TransformerConfig
from bloomft.config.loading import load_config
from bloomft.errors import UserError
from bloomft.export import export
from bloomft.model.base import load_base
from bloomft.model.base_identity import (
    EXPORT_MARK,
    base_identity,
    check_adapter_base,
    check_base,
    check_merged_base,
)
from bloomft.run.checkpoint import load_checkpoint
from tests.bloomft.peft_models import save_with_peft

NAMES = TransformerConfig(pretrained_model_name_or_path="org/bloom", revision="v2", subfolder="small")
OURS, THEIRS = "a" * 40, "b" * 40
HERE = base_identity(NAMES, OURS)


def write_mark(folder, identity):
    folder.mkdir(exist_ok=True)
    (folder / EXPORT_MARK).write_text(json.dumps({"files": [], "base": identity}))


def test_a_run_and_its_exports_name_their_base(run, settings, config_path, tmp_path):
    settings["model"]["transformer"]["revision"] = "1.10"
    settings["optim"]["scheduler"] |= {"num_training_steps": 1, "num_warmup_steps": 0}
    last = run().run_dir / "last.ckpt"
    config = load_config(config_path(settings))
    name = settings["model"]["transformer"]["pretrained_model_name_or_path"]
    fingerprint = load_base(config.model.transformer).identity["fingerprint"]
    expected = {"name": name, "revision": "1.10", "subfolder": None, "fingerprint": fingerprint}
    assert load_checkpoint(last).base == expected
    for kind in ("merged", "adapter"):
        export(config, last, tmp_path / kind, kind)
        assert json.loads((tmp_path / kind / EXPORT_MARK).read_text())["base"] == expected
    peft = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (peft.base_model_name_or_path, peft.revision) == (name, "1.10")
    assert check_adapter_base(tmp_path / "adapter", expected) is None
    with pytest.raises(UserError, match=rf"adapter: trained on the base model {name} \(revision 1.10, "):
        check_adapter_base(tmp_path / "adapter", HERE)


def test_another_base_is_refused_by_all_its_names(tmp_path):
    known = {"name": "org/other", "revision": None, "subfolder": "large", "fingerprint": THEIRS}
    with pytest.raises(UserError) as caught:
        check_base(known, HERE, tmp_path / "last.ckpt")
    assert str(caught.value) == (
        f"{tmp_path}/last.ckpt: trained on the base model org/other (subfolder large, bbbbbbbb), "
        "but org/bloom (revision v2, subfolder small, aaaaaaaa) is a different one"
    )
    # Checkpoints of earlier versions have name and fingerprint alone; a folder may have moved.
    check_base({"name": "/elsewhere", "fingerprint": OURS}, HERE, tmp_path)
    with pytest.raises(UserError, match=r"org/bloom \(revision v2, subfolder small, bbbbbbbb\), but "):
        check_base(base_identity(NAMES, THEIRS), HERE, tmp_path)


def test_an_adapter_of_another_base(tmp_path):
    write_mark(tmp_path, base_identity(NAMES, THEIRS))
    with pytest.raises(UserError, match=r"trained on the base model org/bloom .*bbbbbbbb.*a different one"):
        check_adapter_base(tmp_path, HERE)
    assert check_adapter_base(tmp_path, base_identity(NAMES, THEIRS)) is None


def test_a_foreign_adapter_is_taken_with_a_note(base_folder, tmp_path):
    save_with_peft(base_folder, tmp_path)
    note = check_adapter_base(tmp_path, HERE)
    assert note.startswith(f"{tmp_path}: made for {base_folder}, without a fingerprint")
    assert "org/bloom" in note
    assert "\n" not in note
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v7"}))
    assert f"made for {base_folder} (revision v7), " in check_adapter_base(tmp_path, HERE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base": 3}', '{"base": {"name": 3, "fingerprint": 4}}'])
def test_a_damaged_mark(tmp_path, text):
    (tmp_path / EXPORT_MARK).write_text(text)
    for check in (
        lambda: check_adapter_base(tmp_path, HERE),
        lambda: check_merged_base(tmp_path, NAMES),
    ):
        with pytest.raises(UserError, match=rf"{EXPORT_MARK}: cannot be read: "):
            check()


def test_a_merged_folder_of_another_base(tmp_path, monkeypatch):
    check_merged_base(tmp_path, NAMES)  # nobody's export
    write_mark(tmp_path, base_identity(NAMES, THEIRS))
    check_merged_base(tmp_path, NAMES)
    for change in ({"name": "org/other"}, {"revision": "v1"}, {"subfolder": None}):
        write_mark(tmp_path, base_identity(NAMES, THEIRS) | change)
        with pytest.raises(
            UserError, match=r"merged into the base model org/.*names org/bloom \(revision v2"
        ):
            check_merged_base(tmp_path, NAMES)
    monkeypatch.chdir(tmp_path)
    write_mark(tmp_path, {"name": str(tmp_path), "fingerprint": THEIRS})
    check_merged_base(tmp_path, TransformerConfig(pretrained_model_name_or_path="."))
