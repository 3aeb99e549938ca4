"""The main job by its commands' functions: trained, killed and resumed to the same bits, exported, generated
from. Training has processes of its own."""

import contextlib
import functools
import io
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file
from transformers import BloomForCausalLM

import bloomft.train
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from bloomft import export, generate
from bloomft.model.base import EMBEDDED_BASE
from bloomft.run import setup
from bloomft.run.checkpoint import load_checkpoint

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RUNS = (("bf16", True), ("bf16", False), ("fp16", False), ("fp32", False))
GRAPH_RUNS = (("bf16", False), ("bf16", True), ("fp16", "selective"))
STEPS, SAVED, KILLED = 40, 10, 20
SCALE = 2.0
# of metrics.jsonl, what depends on time and memory
_MEASURED = {"tokens_per_second", "mfu", "peak_memory_gib"}


def first() -> list[Item]:
    """Packed training in each precision, compiled too, the slowest first; with and without a CUDA graph."""
    jobs = [
        Item(
            f"training {precision}{', compiled' if compiled else ''}",
            check_job,
            {"precision": precision, "compiled": compiled},
            limit=220.0,
        )
        for precision, compiled in RUNS
    ]
    graphs = [
        Item(
            f"training {precision}, with and without a CUDA graph, checkpointing {checkpointing}",
            check_graph,
            {"precision": precision, "checkpointing": checkpointing},
            limit=220.0,
        )
        for precision, checkpointing in GRAPH_RUNS
    ]
    return [*jobs, *graphs]


def rest() -> list[Item]:
    """Nothing: all of it is in the first group."""
    return []


def check_job(findings: Findings, setting: Setting, precision: str, compiled: bool) -> None:
    """An uninterrupted run, one that is killed by SIGKILL and resumed, and exports of the result."""
    folder = setting.scratch / f"training-{precision}-{compiled}"
    whole, killed = folder / "whole", folder / "killed"
    killed.mkdir(parents=True)
    base = make_base(setting, folder, PRECISIONS[precision])
    config = write_config(setting, folder, base, precision, compiled)
    finish(findings, start_training(setting, config, whole))
    # It also holds the choices between implementations: others are as right, but differ in bits.
    shutil.copy(whole / f"step-{SAVED}.ckpt", killed / "last.ckpt")
    kill(start_training(setting, config, killed), KILLED - SAVED)
    finish(findings, start_training(setting, config, killed))
    compare_runs(findings, whole, killed)
    check_exports(findings, config, whole, base)


def check_graph(findings: Findings, setting: Setting, precision: str, checkpointing: bool | str) -> None:
    """A run that replays its steps from a graph and one that does not, from one checkpoint on; and, in
    `check_job`, a run under the graph that is killed and resumed."""
    folder = setting.scratch / f"graph-{precision}-{checkpointing}"
    replayed, plain = folder / "replayed", folder / "plain"
    plain.mkdir(parents=True)
    base = make_base(setting, folder, PRECISIONS[precision])
    config = write_config(setting, folder, base, precision, compiled=False)
    checkpointed = f"train.gradient_checkpointing={str(checkpointing).lower()}"
    finish(findings, start_training(setting, config, replayed, checkpointed))
    # it also holds the choices between implementations
    shutil.copy(replayed / f"step-{SAVED}.ckpt", plain / "last.ckpt")
    finish(findings, start_training(setting, config, plain, checkpointed, "train.cuda_graph=false"))
    used = "CUDA graph: yes" in (replayed / "log").read_text()
    findings.require(used or setting.device != "cuda", "no CUDA graph was used")
    findings.require("CUDA graph: no (as configured)" in (plain / "log").read_text(), "a graph unasked for")
    compare_runs(findings, replayed, plain)


def make_base(setting: Setting, folder: Path, dtype: torch.dtype) -> Path:
    """The embedded base, stored in dtype as published ones are in 16 bits; a rehearsal's has one layer."""
    base = folder / "base"
    shutil.copytree(EMBEDDED_BASE, base)
    model = BloomForCausalLM.from_pretrained(EMBEDDED_BASE)
    model.config.n_layer = setting.pick(model.config.n_layer, 1)
    del model.transformer.h[model.config.n_layer :]
    model.to(dtype).save_pretrained(base)
    return base


def write_config(setting: Setting, folder: Path, base: Path, precision: str, compiled: bool) -> Path:
    """The YAML file of the run."""
    config = {
        "data": {
            "filenames": "builtin:installed-readmes",
            "max_length": setting.pick(256, 32),
            "cache_dir": str(folder),
        },
        "model": {
            "transformer": {"pretrained_model_name_or_path": str(base)},
            "lora": {"lora_dim": 8, "lora_scale": SCALE, "lora_dropout": 0.1},
        },
        "optim": {
            "optimizer": {"lr": 1e-2},
            "scheduler": {"name": "linear", "num_warmup_steps": 2, "num_training_steps": STEPS},
        },
        "train": {
            "batch_size": 4,
            "log_every_n_steps": 1,
            "save_every_n_train_steps": SAVED,
            "eval_max_batches": 4,
            "precision": precision,
            "compile": compiled,
            "device": setting.device,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Training:
    """A training command in a process of its own, which writes to errors instead of stderr."""

    process: BaseProcess
    run_dir: Path
    errors: Path


def start_training(setting: Setting, config: Path, run_dir: Path, *overrides: str) -> Training:
    """Train, or resume, in run_dir, with other values for keys of config."""
    errors = run_dir.with_suffix(".stderr")
    arguments = [str(config), f"train.output_dir={run_dir}", *overrides]
    process = setting.processes.Process(target=train, args=(arguments, errors, setting.compiler))
    process.start()
    return Training(process, run_dir, errors)


def train(arguments: list[str], errors: Path, compiler: dict[str, str]) -> None:
    """The process: ``python -m bloomft.train *arguments``, with options for torch.compile."""
    sys.stderr = errors.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.__stderr__.fileno())
    # a copied process would be silent about what its parent has been warned of
    warnings.simplefilter("always")
    blocks = functools.partial(setup.compile_blocks, **compiler)
    with patch.object(setup, "compile_blocks", blocks):
        bloomft.train.main(arguments)


def finish(findings: Findings, training: Training) -> None:
    """Wait for its end; a warning about an implementation is a fault."""
    training.process.join()
    errors = training.errors.read_text(errors="replace")
    if training.process.exitcode:
        raise RuntimeError(
            f"training in {training.run_dir} ended with {training.process.exitcode}: {errors[-2000:]}"
        )
    findings.faults += [line for line in errors.splitlines() if "Warning: lorakernels:" in line]


def kill(training: Training, lines: int) -> None:
    """End it with SIGKILL once ``lines`` lines of metrics are written."""
    metrics = training.run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        if training.process.exitcode is not None:
            raise RuntimeError(
                f"training in {training.run_dir} ended with {training.process.exitcode} before its time"
            )
        time.sleep(0.002)
    training.process.kill()
    training.process.join()


def compare_runs(findings: Findings, whole: Path, killed: Path) -> None:
    """Same adapters and optimizer in the last checkpoint, same losses before it, all of them finite."""
    expected, actual = (load_checkpoint(folder / "last.ckpt") for folder in (whole, killed))
    findings.require(actual.step == expected.step == STEPS, f"steps {actual.step} and {expected.step}")
    for name, value in expected.adapters.items():
        findings.require(torch.equal(actual.adapters[name], value), f"{name}: other bits after resuming")
        findings.require(
            bool(value.isfinite().all() and value.any()), f"{name}: not trained to finite values"
        )
    for index, state in expected.optimizer["state"].items():
        same = all(
            torch.equal(value, actual.optimizer["state"][index][name]) for name, value in state.items()
        )
        findings.require(same, f"optimizer state {index}: other bits after resuming")
    losses = read_metrics(whole)
    findings.require(len(losses) == STEPS, f"{len(losses)} lines of metrics for {STEPS} steps")
    findings.require(read_metrics(killed) == losses[SAVED:], "other metrics after resuming")
    findings.require(all(line["loss"] is not None for line in losses), "a loss is not finite")
    findings.notes["loss"] = f"{losses[0]['loss']:.4f} to {losses[-1]['loss']:.4f}"


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what was measured."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in _MEASURED} for line in lines]


def check_exports(findings: Findings, config: Path, run_dir: Path, base: Path) -> None:
    """Merged weights and PEFT's adapter against the checkpoint, and greedy text of each."""
    override = f"train.output_dir={run_dir}"
    for kind in ("merged", "adapter"):
        command(export.main, str(config), "last.ckpt", "--format", kind, override)
    state = load_checkpoint(run_dir / "last.ckpt").adapters
    merged = BloomForCausalLM.from_pretrained(run_dir / "merged").state_dict()
    for name, weight in BloomForCausalLM.from_pretrained(base).state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" not in state:
            findings.require(torch.equal(merged[name], weight), f"merged: {name} differs from the base's")
            continue
        delta = state[f"{layer}.lora_b"].double() @ state[f"{layer}.lora_a"].double()
        exact = weight.double() + SCALE * delta
        findings.compare(
            f"merged: {name}", merged[name], exact, weight.dtype, operands=torch.float32, terms=8
        )
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    ours = sorted((name.lower(), value.tolist()) for name, value in state.items())
    theirs = (
        (name.removeprefix("base_model.model.").removesuffix(".weight"), v) for name, v in adapter.items()
    )
    findings.require(
        ours == sorted((name.lower(), value.tolist()) for name, value in theirs),
        "adapter: not the checkpoint's",
    )
    texts = {
        source: command(
            generate.main, str(config), *source, "--prompt", "Return the", "--max-new-tokens", "12",
            "--temperature", "0", override,
        )
        for source in ((), ("last.ckpt",), ("adapter",), ("merged",))
    }  # fmt: skip
    findings.notes |= {f"text of {' '.join(source) or 'base'}": text for source, text in texts.items()}
    findings.require(all(len(text) > len("Return the") for text in texts.values()), "nothing was generated")
    findings.require(texts["last.ckpt",] == texts["adapter",], "the adapter writes another text")


def command(main, *arguments: str) -> str:
    """What a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue()
