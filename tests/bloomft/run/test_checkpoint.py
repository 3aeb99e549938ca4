"""Attacks on a run's checkpoints: damaged bytes, wrong content, states that are not finite, leftovers."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
import torch

from bloomft.errors import UserError
from bloomft.files import write_atomically
from bloomft.run import checkpoint as checkpoint_module
from bloomft.run.checkpoint import DamagedCheckpointError, load_checkpoint, save_checkpoint
from tests.bloomft.run_folder import same_adapters


def rewrite(path: Path, change, *, digest: bool = True) -> None:
    """Change a checkpoint's content and write it as a run would, with a hash that is right."""
    content = torch.load(path, weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if digest:
        checkpoint_module._append_digest(buffer)
    path.write_bytes(buffer.getvalue())


def test_every_flipped_bit_and_every_cut_is_found(short_run, tmp_path):
    path = short_run().run_dir / "last.ckpt"
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["step"] == 6
    generator = random.Random(0)
    places = [generator.randrange(8 * len(whole)) for _ in range(600)]
    # The hash itself, the mark before it, and the zip's last record too.
    places += [8 * at + at % 8 for at in range(len(whole) - 110, len(whole))]
    damaged = tmp_path / "damaged.ckpt"
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        damaged.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=r"damaged.ckpt: .*damaged"):
            load_checkpoint(damaged)
    for length in [0, 1, 3, 4, 22, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(50))]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError, match=r"damaged.ckpt: .*damaged"):
            load_checkpoint(damaged)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(damaged)


def a_tar_file(path):
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            file.addfile(tarfile.TarInfo(name))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_bytes(b"PK\x03\x04 broken"),
        a_tar_file,
    ],
    ids=["text", "the start of a zip", "a tar file"],
)
def test_a_file_of_another_kind_is_named(tmp_path, write):
    path = tmp_path / "last.ckpt"
    write(path)
    with pytest.raises(DamagedCheckpointError, match=r"last.ckpt: not a checkpoint of bloomft, or a"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_program_and_none_at_all_are_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of bloomft"):
        load_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(tmp_path / "absent.ckpt")


def first(content: dict, name: str):
    return next(iter(content[name]))


WRONG_FIELDS = {
    "no format": lambda content: content.pop("format"),
    "a list": lambda content: content.update(format=[2]),
    "another format": lambda content: content.update(format=5),
    "kernels of another kind": lambda content: content.update(kernels=["aten"]),
    "no precision": lambda content: content.pop("precision"),
    "no word of CUDA graphs": lambda content: content.pop("cuda_graph"),
    "a CUDA graph of another type": lambda content: content.update(cuda_graph="auto"),
    "a precision of another name": lambda content: content.update(precision="int8"),
    "step -3": lambda content: content.update(step=-3),
    "step true": lambda content: content.update(step=True),
    "no step": lambda content: content.pop("step"),
    "position text": lambda content: content.update(position="4"),
    "no adapters": lambda content: content.update(adapters={}),
    "adapters list": lambda content: content.update(adapters=[1]),
    "adapter of another name": lambda content: content["adapters"].update(weight=torch.zeros(2, 2)),
    "adapter not a number": lambda content: content["adapters"][first(content, "adapters")].fill_(torch.nan),
    "adapter of another rank": lambda content: content["adapters"].update(
        {name: torch.zeros(2, 3) for name in content["adapters"]}
    ),
    "adapter of no dimension": lambda content: content["adapters"].update(
        {name: torch.zeros(()) for name in content["adapters"]}
    ),
    "no rng": lambda content: content.update(rng={}),
    "rng of a strange device": lambda content: content["rng"].update(there=content["rng"]["cpu"]),
    "no window": lambda content: content.update(window={}),
    "window not a number": lambda content: content["window"].update(loss=float("nan")),
    "no scheduler": lambda content: content.update(scheduler={}),
    "no optimizer": lambda content: content.update(optimizer={}),
    "no base": lambda content: content.update(base={}),
    "no configuration": lambda content: content.update(config=""),
    "a configuration that is no YAML": lambda content: content.update(config="{"),
    "another lora": lambda content: content["lora"].update(alpha=3),
    "lora rank 10**9": lambda content: content["lora"].update(lora_dim=10**9),
    "data of another kind": lambda content: content.update(data=None),
    "base loss of another kind": lambda content: content.update(base_eval_loss="low"),
}

MISFITS = {
    "step 10**9": lambda content: content.update(step=10**9),
    "kernels with text": lambda content: content.update(kernels={"a": {"milliseconds": "fast"}}),
    "kernels without a winner": lambda content: content.update(kernels={"a": {}}),
    "scheduler of another kind": lambda content: content["scheduler"].pop("base_lrs"),
    "scheduler with text": lambda content: content["scheduler"].update(base_lrs=["high"]),
    "rng of another size": lambda content: content["rng"].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    "a layer is missing": lambda content: content["adapters"].pop(first(content, "adapters")),
    "adapters of another width": lambda content: content["adapters"].update(
        {name: torch.zeros(4, 4) for name in content["adapters"]}
    ),
    "no moments of one": lambda content: content["optimizer"]["state"].pop(0),
    "no second moment": lambda content: content["optimizer"]["state"][0].pop("exp_avg_sq"),
    "exp_avg of another shape": lambda content: content["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(2)
    ),
    "exp_avg in half precision": lambda content: content["optimizer"]["state"][1].update(
        exp_avg=content["optimizer"]["state"][1]["exp_avg"].half()
    ),
    "exp_avg not a number": lambda content: content["optimizer"]["state"][1]["exp_avg"].fill_(torch.nan),
    "step of a parameter is a list": lambda content: content["optimizer"]["state"][0].update(step=[1]),
    "groups of other parameters": lambda content: content["optimizer"]["param_groups"][0].update(
        params=[3, 2, 1, 0]
    ),
    "a group without a learning rate": lambda content: content["optimizer"]["param_groups"][0].pop("lr"),
    "groups without parameters": lambda content: content["optimizer"].update(param_groups=[]),
}


def test_wrong_content_is_one_line(short_run, tmp_path):
    whole = (short_run().run_dir / "last.ckpt").read_bytes()
    path = tmp_path / "wrong.ckpt"
    for name, change in WRONG_FIELDS.items():
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(UserError, match=r"wrong.ckpt: .*checkpoint") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value), name


def test_content_that_does_not_fit_the_run_is_one_line(short_run, settings):
    path = short_run().run_dir / "last.ckpt"
    whole = path.read_bytes()
    settings["optim"]["scheduler"]["num_training_steps"] = 8
    for name, change in MISFITS.items():
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(UserError, match=r"last.ckpt: does not fit|holds step 1000000000") as caught:
            short_run()
        assert "\n" not in str(caught.value), name
    path.write_bytes(whole)
    assert short_run().step == 8


def test_what_another_version_of_torch_keeps_beside_it_is_no_misfit(short_run, settings, tmp_path):
    whole = short_run().run_dir

    def other_version(content):
        content["scheduler"].pop("_step_count")
        content["scheduler"]["_of_a_later_version"] = True
        for group in content["optimizer"]["param_groups"]:
            group.pop("capturable")
            group["of_a_later_version"] = None

    other = tmp_path / "other.ckpt"
    other.write_bytes((whole / "step-4.ckpt").read_bytes())
    rewrite(other, other_version)
    settings["train"] |= {"output_dir": str(tmp_path / "again"), "resume": str(other)}
    assert same_adapters(short_run().run_dir, whole)


def test_what_is_no_damage_is_not_passed_over(short_run):
    path = short_run().run_dir / "last.ckpt"
    rewrite(path, lambda content: content.update(format=5))
    with pytest.raises(UserError, match=r"checkpoint format 5; this program reads formats 1 to 4"):
        short_run()


def test_a_checkpoint_of_format_1_is_converted(short_run, settings, tmp_path):
    whole = short_run().run_dir

    def older(content):
        assert content["position"] == 16
        content.update(format=1, position=4)
        for later in ("kernels", "precision", "cuda_graph"):
            content.pop(later)

    old = tmp_path / "old.ckpt"
    old.write_bytes((whole / "step-4.ckpt").read_bytes())
    rewrite(old, older, digest=False)
    assert load_checkpoint(old).position == 16
    settings["train"] |= {"output_dir": str(tmp_path / "again"), "resume": str(old)}
    assert same_adapters(short_run().run_dir, whole)
    # Its zip's own checksums find a damage of the tensors.
    content = bytearray(old.read_bytes())
    content[content.index(load_checkpoint(old).rng["cpu"].numpy().tobytes()) + 99] ^= 1
    old.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        load_checkpoint(old)


def test_a_checkpoint_of_format_2_had_no_kernel_choices(short_run, settings, tmp_path):
    whole = short_run().run_dir
    old = tmp_path / "old.ckpt"
    old.write_bytes((whole / "step-4.ckpt").read_bytes())

    def older(content):
        content["format"] = 2
        for later in ("kernels", "precision", "cuda_graph"):
            content.pop(later)

    rewrite(old, older)
    settings["train"] |= {"output_dir": str(tmp_path / "again"), "resume": str(old)}
    again = short_run().run_dir
    assert same_adapters(again, whole)
    assert "without kernel choices: measured anew" in (again / "log").read_text()


def test_a_checkpoint_of_format_3_did_not_tell_of_cuda_graphs(short_run, settings, tmp_path):
    whole = short_run().run_dir
    old = tmp_path / "old.ckpt"
    old.write_bytes((whole / "step-4.ckpt").read_bytes())

    def older(content):
        content["format"] = 3
        content.pop("cuda_graph")

    rewrite(old, older)
    assert load_checkpoint(old).cuda_graph is None
    settings["train"] |= {"output_dir": str(tmp_path / "again"), "resume": str(old)}
    again = short_run().run_dir
    assert same_adapters(again, whole)
    assert "CUDA graph: no (the device is cpu)\n" in (again / "log").read_text()


def test_format_1_without_its_batch_size_is_refused(short_run, tmp_path):
    path = short_run().run_dir / "last.ckpt"
    rewrite(path, lambda content: content.update(format=1, config="{}"), digest=False)
    with pytest.raises(UserError, match=r"last.ckpt: .*no run writes such a value of 'config'"):
        load_checkpoint(path)


BECOMES_INFINITE = [
    {"optim__optimizer__lr": 1e38},
    {"optim__optimizer__eps": 1e-300},
    {"optim__optimizer__weight_decay": 1e300},
]


@pytest.mark.parametrize(
    ("cause", "steps"),
    [
        *((cause, steps) for cause in BECOMES_INFINITE for steps in (1, 6)),
        ({"optim__optimizer__lr": 1e30, "train__gradient_clip_val": 0.0}, 6),
    ],
)
def test_no_state_that_is_not_finite_is_ever_written(short_run, settings, cause, steps):
    settings["optim"]["scheduler"] |= {"num_warmup_steps": 0, "num_training_steps": steps}
    settings["train"] |= {"save_every_n_train_steps": 1, "log_every_n_steps": 100}
    with pytest.raises(UserError, match=r"step \d: not finite: .*; try a lower optim.optimizer.lr") as caught:
        short_run(**cause)
    folder = Path(settings["train"]["output_dir"])
    for path in folder.glob("*.ckpt"):
        state = load_checkpoint(path)
        moments = [value for moments in state.optimizer["state"].values() for value in moments.values()]
        assert all(value.isfinite().all() for value in [*state.adapters.values(), *moments])
    if (folder / "last.ckpt").exists():
        assert f"last.ckpt still holds step {load_checkpoint(folder / 'last.ckpt').step};" in str(
            caught.value
        )
    else:
        assert "; nothing is saved yet;" in str(caught.value)


def test_a_full_disk_leaves_the_old_checkpoint(short_run, monkeypatch, tmp_path):
    result = short_run()
    path = result.run_dir / "last.ckpt"
    before, state = path.read_bytes(), load_checkpoint(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(state, result.run_dir, keep=False)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(tmp_path / "new", b"content")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".new*"))
