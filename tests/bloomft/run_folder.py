"""What a run has left in its folder."""

import json
from pathlib import Path

import torch

from bloomft.run.checkpoint import load_checkpoint


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def lines(folder: str | Path) -> int:
    """How many lines of metrics.jsonl are complete, also while a run writes it; 0 without the file."""
    path = Path(folder) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def adapters(folder: str | Path, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / name).adapters


def same_adapters(left: str | Path, right: str | Path) -> bool:
    """Whether the last checkpoints of two runs hold the same bits."""
    left, right = adapters(left), adapters(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
