"""The training loop, in process, on a base that trains in seconds."""

import dataclasses
import math
import re

import pytest
import torch

from bloomft import accounting
from bloomft.config.keys import SCHEDULES
from bloomft.errors import UserError
from bloomft.run.checkpoint import load_checkpoint, save_checkpoint
from lorakernels import dispatch
from tests.bloomft.conftest import tiny_model
from tests.bloomft.run_folder import adapters, metrics, same_adapters


def test_a_run_learns_and_leaves_what_it_promises(run):
    result = run(optim__scheduler__num_training_steps=30)
    assert result.step == 30
    assert result.eval_loss < result.base_eval_loss - 0.3
    lines = metrics(result.run_dir)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gib"} <= lines[
        0
    ].keys()
    assert all(0 < line["supervised_share"] <= 1 and line["mfu"] > 0 for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12, 18, 24, 30]
    assert lines[-1]["eval_loss"] == result.eval_loss
    names = {path.name for path in result.run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "last.ckpt", "step-3.ckpt", "step-30.ckpt", "log"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_a_16_bit_run_records_its_choices_and_goes_on_with_them(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKERNELS_CACHE_DIR", str(tmp_path / "choices"))
    monkeypatch.setitem(dispatch.LARGE, "cpu", 0)
    dispatch.forget()
    half = run(train__precision="bf16", optim__scheduler__num_training_steps=3)
    state = load_checkpoint(half.run_dir / "last.ckpt")
    recorded = state.kernels
    assert {problem.split(" on ")[0] for problem in recorded} == {
        "lora_linear forward", "lora_linear backward", "frozen products",
    }  # fmt: skip
    dispatch.forget()
    # another choice on disk and in the checkpoint: the checkpoint's counts
    other = {
        problem: {
            **choice,
            "winner": next(name for name in choice["milliseconds"] if name != choice["winner"]),
        }
        for problem, choice in recorded.items()
    }
    save_checkpoint(dataclasses.replace(state, kernels=other), half.run_dir, keep=False)
    run(train__precision="bf16", optim__scheduler__num_training_steps=4)
    assert {problem: dispatch.kernel_choices()[problem]["winner"] for problem in other} == {
        problem: choice["winner"] for problem, choice in other.items()
    }
    dispatch.forget()


def test_the_checkpoint_holds_adapters_and_never_the_base(run):
    result = run()
    raw = torch.load(result.run_dir / "last.ckpt", weights_only=True)
    assert raw["step"] == 12
    assert raw["position"] == 48
    assert {name.rsplit(".", 1)[-1] for name in raw["adapters"]} == {"lora_a", "lora_b"}
    assert len(raw["adapters"]) == 4
    assert (result.run_dir / "last.ckpt").stat().st_size < 100_000


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tmp_path):
    first = run(model__lora__lora_dropout=0.1)
    again = run(train__output_dir=str(tmp_path / "again"))
    other = run(train__output_dir=str(tmp_path / "other"), data__random_state=7)
    assert same_adapters(first.run_dir, again.run_dir)
    assert not same_adapters(first.run_dir, other.run_dir)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(run, tmp_path):
    # Without packing rows have different numbers of labels, which a mean of means would weigh wrongly.
    whole = run(data__packing=False, train__batch_size=8)
    cut = run(train__output_dir=str(tmp_path / "cut"), train__batch_size=2, train__accumulate_grad_batches=4)
    for left, right in zip(metrics(whole.run_dir), metrics(cut.run_dir), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("mode", [True, "selective"])
def test_gradient_checkpointing_changes_nothing(run, tmp_path, mode):
    plain = run(model__lora__lora_dropout=0.1)
    again = run(train__output_dir=str(tmp_path / "again"), train__gradient_checkpointing=mode)
    for name, value in adapters(plain.run_dir).items():
        torch.testing.assert_close(adapters(again.run_dir)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(run, precision):
    result = run(train__precision=precision, optim__scheduler__num_training_steps=20)
    assert result.eval_loss < result.base_eval_loss - 0.1
    assert all(value.dtype == torch.float32 for value in adapters(result.run_dir).values())
    assert bool(load_checkpoint(result.run_dir / "last.ckpt").scaler) == (precision == "fp16")


_EXTRA = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "reduce_lr_on_plateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_and_resumes(run, name, tmp_path):
    changes = {
        "optim__scheduler__name": name,
        "optim__scheduler__scheduler_specific_kwargs": _EXTRA.get(name, {}),
    }
    whole = run(optim__scheduler__num_training_steps=4, train__eval_every_n_steps=1, **changes)
    again = run(train__output_dir=str(tmp_path / "again"), train__resume=str(whole.run_dir / "step-3.ckpt"))
    assert same_adapters(whole.run_dir, again.run_dir)


def test_torch_compile_trains_to_the_same_losses(run, tmp_path):
    plain = run(optim__scheduler__num_training_steps=3)
    compiled = run(train__output_dir=str(tmp_path / "compiled"), train__compile=True)
    for left, right in zip(metrics(plain.run_dir), metrics(compiled.run_dir), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_parts_and_a_path_relative_to_the_run(run):
    result = run(model__lora__parts=["q", "v"])
    assert adapters(result.run_dir)["transformer.h.0.self_attention.query_key_value.lora_b"].shape == (96, 4)
    with pytest.raises(UserError, match=r"no checkpoint at absent.ckpt or .*has last.ckpt, step-12.ckpt"):
        run(train__resume="absent.ckpt")


def test_what_was_skipped_is_counted_on_a_cached_run_too(run, corpus, capsys):
    (corpus / "98.txt").write_bytes(b"\xff\xfe\xfa")
    (corpus / "99.txt").write_text("")
    folder = run(optim__scheduler__num_training_steps=2).run_dir
    run(optim__scheduler__num_training_steps=3)
    for shown in (capsys.readouterr().err, (folder / "log").read_text()):
        assert shown.count("data: 40 documents in 42 files (skipped: 1 with invalid UTF-8, 1 empty)") == 2


def test_no_held_out_text(run):
    result = run(data__heldout_fraction=0.0)
    assert result.base_eval_loss is None
    assert result.eval_loss is None
    assert all("eval_loss" not in line for line in metrics(result.run_dir))


def test_a_finished_run_started_again_stays_as_it_is(run):
    first = run()
    before = (first.run_dir / "last.ckpt").read_bytes()
    again = run()
    assert again.step == 12
    assert math.isclose(again.eval_loss, first.eval_loss, rel_tol=1e-6)
    assert (first.run_dir / "last.ckpt").read_bytes() == before
    assert len(metrics(first.run_dir)) == 12


def test_a_longer_run_goes_on_from_a_finished_one(run):
    run()
    assert run(optim__scheduler__num_training_steps=15).step == 15


def test_resume_never_moves_the_old_run_aside(run):
    first = run()
    before = (first.run_dir / "last.ckpt").read_bytes()
    run(train__resume="never", optim__scheduler__num_training_steps=2)
    assert (first.run_dir.with_name("run.1") / "last.ckpt").read_bytes() == before
    assert len(metrics(first.run_dir)) == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model__lora__lora_dim": 8}, "model.lora.lora_dim is 4 there and 8"),
        ({"data__max_length": 16}, "its training rows differ"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(run, change, expected):
    run()
    with pytest.raises(UserError, match=expected):
        run(**change)


def test_no_line_says_that_more_than_the_machine_s_limit_was_reached(run, monkeypatch):
    # a first measurement on a machine that is busy with something else
    rates = iter([1.0])
    measure = accounting.gemm_rate
    monkeypatch.setattr(accounting, "gemm_rate", lambda *place: next(rates, None) or measure(*place))
    result = run()
    lines = metrics(result.run_dir)
    assert all(0 < line["mfu"] <= 1 for line in lines)
    assert lines[-1]["mfu"] < 0.9
    said = [line for line in (result.run_dir / "log").read_text().splitlines() if " MFU: " in line]
    assert said[0].endswith("MFU: the share of 0 GFLOP/s, measured here")
    assert "4 FLOPs a frozen parameter and token, attention counted, recomputation not" in said[1]
    assert said[2].endswith(" GFLOP/s, measured here again")


def test_the_start_says_what_a_step_and_the_run_take(run, capsys):
    result = run(
        train__batch_size=3, train__accumulate_grad_batches=2, train__precision="fp32", data__packing=True
    )
    said = (result.run_dir / "log").read_text()
    rows = int(re.search(r"data: (\d+) rows of at most 32 tokens", said)[1])
    step = re.search(r"step: 3 rows x 2, about (\d+) tokens; epoch: (\d+) rows, ([\d.]+) steps\n", said)
    assert 6 * 20 < int(step[1]) <= 6 * 32
    assert (int(step[2]), float(step[3])) == (rows, round(rows / 6, 1))
    epochs = f"{12 * 6 / rows:.1f}"
    run_line = f"run: 12 steps, {epochs} epochs; lr 1.0e-02 linear, warm-up 2; checkpointing off\n"
    assert run_line in said
    state = load_checkpoint(result.run_dir / "last.ckpt")
    adapters = sum(tensor.nbytes for tensor in state.adapters.values()) / 2**20
    base = sum(parameter.nbytes for parameter in tiny_model().parameters()) / 2**20
    assert (
        f"memory, computed: base {base:.1f}, adapters {adapters:.1f}, "
        f"gradients and AdamW {3 * adapters:.1f} MiB\n"
    ) in said
    assert "base: fp32 on cpu (as configured)\n" in said
    shown = capsys.readouterr().err
    assert run_line in shown
    assert max(len(line) for line in shown.splitlines() if "/" not in line) <= 80
