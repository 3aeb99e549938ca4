"""Saving and loading a checkpoint, against plain torch, which does not protect against a power cut.

    python -m pytest benchmarks/test_bench_checkpoint.py --benchmark-only -s

The adapters of BLOOM-7b1 at r = 16 with AdamW's two moments: 94 MB. bloomft writes a temporary file, syncs
and renames it, and stores and checks a hash of the bytes. The floor of saving is the same bytes written and
synced.
"""

import dataclasses
import io
import os

import pytest
import torch

from benchmarks import interleave
from bloomft.run.checkpoint import FORMAT, LAST, TrainingState, load_checkpoint, save_checkpoint

LAYERS, WIDTH, RANK = 30, 4096, 16
OURS, PLAIN = "bloomft", "torch, not synced"


def make_state() -> TrainingState:
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_a": (RANK, WIDTH), "lora_b": (3 * WIDTH, RANK)}
    adapters = {
        f"transformer.h.{layer}.{name}": torch.randn(shape, generator=generator)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    moments = {
        index: {"step": torch.tensor(9.0), "exp_avg": value.clone(), "exp_avg_sq": value.square()}
        for index, value in enumerate(adapters.values())
    }
    return TrainingState(
        step=9, position=9, adapters=adapters, optimizer={"state": moments, "param_groups": []},
        scheduler={"last_epoch": 9}, scaler={}, rng={"cpu": torch.get_rng_state()},
        window={"loss": 1.0, "labels": 3}, kernels={}, precision="fp32", base_eval_loss=None,
        config="{optim: {scheduler: {name: linear}, optimizer: {lr: 1}}, train: {batch_size: 1}}",
        lora={"lora_dim": RANK},
        base={"name": "b", "fingerprint": "f"}, data="",
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A state, its folder, and what was read back, which is bitwise the same."""
    state = make_state()
    save_checkpoint(state, tmp_path, keep=False)
    back = load_checkpoint(tmp_path / LAST)
    same = all(torch.equal(back.adapters[name], value) for name, value in state.adapters.items())
    moments = zip(state.optimizer["state"].values(), back.optimizer["state"].values(), strict=True)
    same &= all(torch.equal(one[name], other[name]) for one, other in moments for name in one)
    interleave.require_right({OURS: [] if same else ["other numbers come back"]})
    return state, tmp_path


@pytest.mark.benchmark(group="checkpoint")
def test_save(benchmark, saved):
    state, folder = saved
    content = {"format": FORMAT, **{f.name: getattr(state, f.name) for f in dataclasses.fields(state)}}
    buffer = io.BytesIO()
    torch.save(content, buffer)

    def bytes_alone() -> None:
        with open(folder / "bytes", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())

    floor = "its bytes, written and synced"
    rivals = {
        floor: bytes_alone,
        PLAIN: lambda: torch.save(content, folder / "plain.ckpt"),
        OURS: lambda: save_checkpoint(state, folder, keep=False),
    }
    size = buffer.getbuffer().nbytes
    title = f"saving a checkpoint of {size / 1e6:.0f} MB"
    counts = {"unit": "bytes", "number": size}
    interleave.compare(benchmark, rivals, floor=floor, rounds=9, title=title, counts=counts)


@pytest.mark.benchmark(group="checkpoint")
def test_load(benchmark, saved):
    folder = saved[1]
    size = (folder / LAST).stat().st_size
    rivals = {
        PLAIN: lambda: torch.load(folder / LAST, weights_only=True),
        OURS: lambda: load_checkpoint(folder / LAST),
    }
    title = f"loading a checkpoint of {size / 1e6:.0f} MB"
    counts = {"unit": "bytes", "number": size}
    interleave.compare(benchmark, rivals, floor=PLAIN, rounds=9, title=title, counts=counts)
