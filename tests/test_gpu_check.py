"""gpu-check: what is wrong turns it red, and no fault of an item reaches another."""

import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import attention_items, dense_items, job_items, lora_items, model_items, report
from benchmarks.gpu_check.__main__ import check, main
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.items import all_items
from benchmarks.gpu_check.pool import Item, Setting
from bloomft.config.loading import config_to_yaml, load_config
from bloomft.model import fused_block, fused_classes
from bloomft.run.checkpoint import TrainingState, save_checkpoint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = INTERPRETED or DEVICE == "cuda"


def compare(findings, got):
    exact = torch.ones(8, dtype=torch.float64)
    findings.compare("ones", got, exact, torch.float32, operands=torch.float32, terms=1)


def right(findings, setting):
    compare(findings, torch.ones(8))


def wrong(findings, setting):
    compare(findings, torch.full((8,), 1.01))


def raising(findings, setting):
    raise RuntimeError("no such kernel")


def crashing(findings, setting):
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(findings, setting, pid_file=None):
    if pid_file is not None:
        pid_file.write_text(str(os.getpid()))
    time.sleep(600)


def run(items, out, seconds=300.0) -> tuple[int, dict[str, dict]]:
    """The exit status, and what the JSON says by item."""
    status = check(items, out, device="cpu", rehearsal=True, workers=1, seconds=seconds)
    return status, outcomes(out)


def outcomes(out: Path) -> dict[str, dict]:
    return {one["item"]: one for one in json.loads((out / "correctness.json").read_text())["items"]}


def test_a_wrong_result_turns_it_red(tmp_path, capsys):
    status, found = run([Item("wrong", wrong), Item("right", right)], tmp_path)
    assert status == 1
    assert found["right"]["status"] == "pass"
    assert found["wrong"]["status"] == "fail"
    (figure,) = found["wrong"]["figures"]
    assert figure["result"] == "ones"
    assert figure["error"] == pytest.approx(0.01, rel=1e-3)
    assert 0 < figure["bound"] < 1e-5
    printed = capsys.readouterr().out
    assert "\nFAIL    wrong" in printed
    assert "\n    ones: relative error 0.01 above the bound" in printed
    assert printed.endswith("\n1 pass, 1 fail\n")
    assert run([Item("right", right)], tmp_path)[0] == 0


def test_no_fault_reaches_another_item(tmp_path):
    faulty = [
        Item("crashing", crashing),
        Item("raising", raising),
        Item("hanging", hanging, limit=0.25),
    ]
    others = [Item(f"right {n}", right) for n in range(4)]
    items = [item for pair in zip(faulty, others[:3], strict=True) for item in pair] + others[3:]
    status, found = run(items, tmp_path)
    assert status == 1
    assert {found[item.name]["status"] for item in others} == {"pass"}
    assert {found[item.name]["status"] for item in faulty} == {"error"}
    assert "ended by signal SIGSEGV" in found["crashing"]["detail"]
    assert "the last words" in found["crashing"]["detail"]
    assert found["raising"]["detail"].startswith("RuntimeError: no such kernel")
    assert "no result within the item's limit of " in found["hanging"]["detail"]


def test_the_limit_lists_what_did_not_run(tmp_path, capsys):
    status, found = run([Item("hanging", hanging), Item("waiting", right)], tmp_path, seconds=2.0)
    assert status == 1
    assert {one["status"] for one in found.values()} == {"not run"}
    assert found["hanging"]["detail"].startswith("stopped after 2 s")
    assert found["waiting"]["detail"].startswith("not begun within 2 s")
    assert capsys.readouterr().out.endswith("\n2 not run\n")


def test_a_crash_of_the_whole_leaves_a_complete_file_and_no_process(tmp_path):
    pid_file = tmp_path / "pid"
    items = [Item("right", right), Item("hanging", hanging, {"pid_file": pid_file})]
    kill_when(lambda: pid_file.exists() and pid_file.read_text(), run, items, tmp_path)
    found = outcomes(tmp_path)
    assert [found[name]["status"] for name in ("right", "hanging")] == ["pass", "not run"]
    wait_for(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())


def kill_when(condition, function, *arguments) -> None:
    """Call the function in a process that is killed as soon as the condition holds."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    wait_for(condition)
    process.kill()
    process.join()


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sources_without_git_are_named_by_their_version(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.about("cpu", True)["source"].startswith("bloomft 0.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_the_command_names_the_rehearsal(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no CUDA device; --rehearse" in capsys.readouterr().err


def test_names_are_unique_and_all_operators_are_among_them():
    names = [item.name for item in all_items()]
    assert len(set(names)) == len(names)
    for start in ("lora_linear", "LoRALinear", "linear_cross_entropy", "frozen_linear", "alibi_attention"):
        assert any(name.startswith(start) for name in names)


def scaled(operator):
    return lambda *inputs, **options: operator(*inputs, **options) * 1.01


def only_tensors(operator):
    return lambda query, key, value, slopes, **_: operator(query, key, value, slopes)


def without_bias(operator):
    return lambda query, key, value, slopes, **options: operator(query, key, value, slopes * 0, **options)


def scaled_first(operator):
    def run(*inputs, **options):
        first, *others = operator(*inputs, **options)
        return first * 1.1, *others

    return run


def without_dropout(operator):
    return lambda *inputs, dropout_p=0.0, **options: operator(*inputs, **options)


def ignoring_documents(_):
    return lambda labels, *_: labels


ODD_SHAPE = {"full": (3, 5, 33, 24), "tiny": (3, 5, 33, 24), "dtype": "bf16"}
MODEL = {"dtype": "bf16", "compiled": False}
MUTATIONS = {
    "lora_linear": ("lora_linear", scaled, lora_items.check_ragged, {"dtype": "fp32"}),
    "dropout": ("lora_linear", without_dropout, lora_items.check_dropout, {"dtype": "fp32"}),
    "documents": ("alibi_attention", only_tensors, attention_items.check_packed, {"head_dim": 8}),
    "bias": ("alibi_attention", without_bias, attention_items.check_shape, ODD_SHAPE),
    "loss": ("linear_cross_entropy", scaled, dense_items.check_loss, {"dtype": "fp32"}),
    "frozen": ("frozen_linear", scaled, dense_items.check_frozen, {"dtype": "bf16"}),
    "norm": ("layer_norm_shrink", scaled_first, dense_items.check_norm, {"dtype": "bf16"}),
    "sum": ("add_layer_norm", scaled_first, dense_items.check_sum, {"dtype": "bf16"}),
    "model": ("alibi_attention", only_tensors, model_items.check_model, MODEL),
    "labels": ("ignore_first_labels", ignoring_documents, model_items.check_model, MODEL),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_operator_is_found(mutation, monkeypatch, tmp_path):
    name, broken, item_check, arguments = MUTATIONS[mutation]
    if item_check.__module__ == lora_items.__name__ and not KERNELS:
        pytest.skip("launches a Triton kernel: needs a CUDA device, or TRITON_INTERPRET=1")
    module = sys.modules[item_check.__module__]
    if item_check is model_items.check_model:
        module = fused_block if hasattr(fused_block, name) else fused_classes
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    findings = Findings()
    item_check(findings, Setting(DEVICE, True, tmp_path), **arguments)
    assert findings.faults


@pytest.mark.parametrize(("left", "faults"), [(1e-6, 0), (1e-3, 2)])
def test_gradients_that_vanish_are_rounding(left, faults):
    """A token alone: kernels subtract two sums of the same products, taken in different orders."""
    shape = (2, 3, 1, 8)
    exact = [torch.full(shape, size, dtype=torch.float64) for size in (1, 0, 0, 1)]
    got = [(right + left * (not right.any())).float() for right in exact]
    findings = Findings()
    attention_items.judge(findings, "whole", got, exact, torch.float32)
    assert len(findings.faults) == faults
    assert len(findings.figures) == 2


def finish_training(findings, folder):
    training = job_items.start_training(Setting("cpu", True, folder), folder / "run.yaml", folder / "run")
    job_items.finish(findings, training)


@pytest.mark.parametrize("ours", [True, False])
def test_of_trainings_warnings_those_of_the_kernels_are_faults(ours, monkeypatch, tmp_path):
    text = "lorakernels: the plain reference computes p" if ours else "an argument is deprecated"

    def warn():
        warnings.warn(text, stacklevel=1)

    def train(arguments):
        # pytest has put its own in the place of the one that prints
        warnings.showwarning = lambda *told: print(warnings.formatwarning(*told[:4]), file=sys.stderr)
        warn()

    monkeypatch.setattr("bloomft.train.main", train)
    findings = Findings()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warn()
        finish_training(findings, tmp_path)
    assert len(findings.faults) == ours


def test_a_training_that_fails_is_an_error_with_its_last_lines(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)run ended with 1: .*run\.yaml"):
        finish_training(Findings(), tmp_path)


@pytest.mark.skipif(not KERNELS, reason="launches a Triton kernel")
def test_of_others_warnings_a_choice_knows_nothing(monkeypatch, tmp_path):
    results = lora_items.results

    def warning(problem):
        warnings.warn("an argument is deprecated", DeprecationWarning, stacklevel=1)
        return results(problem)

    monkeypatch.setattr(lora_items, "results", warning)
    findings = Findings()
    lora_items.check_auto(findings, Setting(DEVICE, True, tmp_path), "560m", "fp32")
    assert findings.faults == []


def test_a_resumed_run_in_other_bits_is_found(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, job_items.STEPS + 1)]
    adapter = torch.linspace(1, 2, 6)[None]
    config = job_items.write_config(Setting("cpu", True, tmp_path), tmp_path, tmp_path, "fp32", False)
    written = {
        "step": job_items.STEPS, "position": 0, "scheduler": {"last_epoch": 1}, "scaler": {},
        "rng": {"cpu": torch.get_rng_state()}, "window": {"loss": 0.0, "labels": 0}, "kernels": {},
        "precision": "fp32", "cuda_graph": None, "base_eval_loss": None, "lora": {"lora_dim": 1},
        "config": config_to_yaml(load_config(config)),
        "base": {"name": "a base", "fingerprint": "0"}, "data": "rows",
    }  # fmt: skip

    def write(name: str, adapter: torch.Tensor, moment: torch.Tensor, lines: list[str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        trained = {"adapters": {"0.lora_a": adapter}}
        trained["optimizer"] = {"state": {0: {"exp_avg": moment}}, "param_groups": []}
        save_checkpoint(TrainingState(**written, **trained), folder, keep=False)
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        return folder

    whole, after = write("whole", adapter, adapter, lines), lines[job_items.SAVED :]
    next_bits = torch.nextafter(adapter, adapter + 1)
    runs = {
        "same": write("same", adapter, adapter, after),
        "lora_a": write("adapters", next_bits, adapter, after),
        "optimizer": write("optimizer", adapter, next_bits, after),
        "metrics": write("metrics", adapter, adapter, after[1:]),
    }
    for name, folder in runs.items():
        findings = Findings()
        job_items.compare_runs(findings, whole, folder)
        assert len(findings.faults) == (name != "same")
        assert all(name in fault for fault in findings.faults)
