"""Memory of each process of a training run: alone, with the whole base each (ddp), with a share of it (fsdp).

    python -m benchmarks.training_memory [--base FOLDER] [--json FILE]

The base is made here unless one is given: BLOOM-560m's sizes in bfloat16, 1.1 GB, of which the vocabulary is
46%, with random weights and the tokenizer of ``builtin:tiny``. Three steps of one row of 128 tokens on a CPU.
Memory is what Linux counts as resident, pages of mapped files among it: after the imports, at the highest
while the base is loaded, and at the highest after that.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SIZES = {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}
CONFIG = Path(__file__).parents[1] / "configs" / "bloom-tiny.yaml"
SETTINGS = (
    "train.resume=never", "train.precision=bf16", "train.batch_size=1", "train.log_every_n_steps=1",
    "data.max_length=128", "data.heldout_fraction=0.0", "optim.scheduler.num_training_steps=3",
    "optim.scheduler.num_warmup_steps=1",
)  # fmt: skip
RUNS = {"alone": (1, "auto"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
MIB = 2**20


def make_base(folder: Path) -> None:
    """A BLOOM of `SIZES` with random weights in bfloat16, with a tokenizer."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    from bloomft.model.base import EMBEDDED_BASE

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**SIZES)).to(torch.bfloat16)
    model.save_pretrained(folder)
    for path in EMBEDDED_BASE.glob("tokenizer*"):
        shutil.copy(path, folder)


def train(arguments: list[str]) -> None:
    """Run ``bloomft.train`` and print this process's memory as a line of JSON."""
    from benchmarks.process_memory import peak, reset_peak, resident
    from bloomft import train as command
    from bloomft.process import share_cores

    share_cores()
    found = {"imports": resident()}
    set_up = command.set_up

    def measured(*given, **named):
        reset_peak()
        job = set_up(*given, **named)
        found["loading"] = peak()
        reset_peak()
        return job

    command.set_up = measured
    command.main(arguments)
    found["training"] = peak()
    # in one write, since all processes have one pipe
    os.write(1, (json.dumps(found) + "\n").encode())


def measure(base: Path, processes: int, strategy: str, folder: Path) -> list[dict[str, int]]:
    """Bytes of each process of one run."""
    command = [sys.executable, "-m", "benchmarks.training_memory", "--train", str(CONFIG), *SETTINGS]
    command += [f"model.transformer.pretrained_model_name_or_path={base}", f"train.output_dir={folder}"]
    command += [f"train.strategy={strategy}"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return list(map(json.loads, done.stdout.splitlines()))


def rows(measured: dict[str, list[dict[str, int]]]) -> Iterator[str]:
    """A table in MiB, of the process with the most in each run."""
    yield "run    imports  loading  training  of alone, all  of alone, without imports"
    most = {name: {key: max(one[key] for one in each) for key in each[0]} for name, each in measured.items()}
    alone = most["alone"]
    for name, one in most.items():
        share = one["training"] / alone["training"]
        above = (one["training"] - one["imports"]) / (alone["training"] - alone["imports"])
        sizes = "  ".join(f"{one[key] / MIB:7,.0f}" for key in ("imports", "loading", "training"))
        yield f"{name:5}  {sizes}  {share:14.2f}  {above:14.2f}"


def main() -> None:
    """Measure, print the table, write the JSON."""
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or Path(scratch, "base")
        if options.base is None:
            make_base(base)
        measured = {name: measure(base, *run, Path(scratch, name)) for name, run in RUNS.items()}
    print("\n".join(rows(measured)))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
