"""Checkpoints: everything a run needs to go on, and never the frozen base.

A checkpoint is one dictionary of tensors and plain values, written by ``torch.save`` and read with
``weights_only=True``. `TrainingState` says what stands in it.
"""

import dataclasses
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomft.errors import UserError
from bloomft.files import write_atomically

FORMAT = 1
LAST = "last.ckpt"


@dataclass
class TrainingState:
    """The state of a run after an optimizer step.

    Attributes:
        step: optimizer steps done.
        position: micro-batches consumed, the place in the endless sequence of epochs.
        adapters: name to float32 tensor, every lora_a and lora_b.
        optimizer, scheduler, scaler: their state dicts; ``scaler`` is empty without fp16.
        rng: generator states by device, "cpu" and "cuda:<index>".
        window: loss sum and label count since the last line of metrics.jsonl.
        base_eval_loss: held-out loss before the first step, None without held-out documents.
        config: the resolved configuration as YAML.
        lora: rank, scale and what else shapes the adapters.
        base: name and fingerprint of the frozen base model.
        data: identity of the training rows.
    """

    step: int
    position: int
    adapters: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any]
    rng: dict[str, Tensor]
    window: dict[str, float]
    base_eval_loss: float | None
    config: str
    lora: dict[str, Any]
    base: dict[str, str]
    data: str


def save_checkpoint(state: TrainingState, run_dir: Path, *, keep: bool) -> None:
    """Write ``last.ckpt`` and, with ``keep``, ``step-<n>.ckpt``, each aside, synced and renamed."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **fields}, buffer)
    if keep:
        write_atomically(run_dir / f"step-{state.step}.ckpt", buffer.getvalue())
    write_atomically(run_dir / LAST, buffer.getvalue())


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint onto the CPU. Raises `UserError` if it is missing, damaged or something else."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint of bloomft, or a damaged one") from error
    names = {field.name for field in dataclasses.fields(TrainingState)}
    if not isinstance(content, dict) or not names <= content.keys():
        raise UserError(f"{path}: not a checkpoint of bloomft")
    if content["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {content['format']}; this program reads format {FORMAT}")
    return TrainingState(**{name: content[name] for name in names})


def find_checkpoint(given: str, run_dir: Path) -> Path:
    """``given`` as it stands, or inside the run's folder if relative and not there; else `UserError`."""
    path = Path(given).expanduser()
    if path.exists():
        return path
    inside = run_dir / path
    if not path.is_absolute() and inside.exists():
        return inside
    places = f"{path} or {inside}" if not path.is_absolute() else str(path)
    known = ", ".join(sorted(found.name for found in run_dir.glob("*.ckpt"))[:8])
    there = f"; {run_dir} has {known}" if known else f"; {run_dir} has no checkpoint yet"
    raise UserError(f"no checkpoint at {places}{there}")


def check_base(state: TrainingState, base_name: str, base_fingerprint: str, path: Path) -> None:
    """Raise `UserError` unless the checkpoint was trained on this very base model."""
    if state.base["fingerprint"] != base_fingerprint:
        raise UserError(
            f"{path}: trained on the base model {state.base['name']} ({state.base['fingerprint'][:8]}), "
            f"but {base_name} is another one ({base_fingerprint[:8]})"
        )


def rng_states() -> dict[str, Tensor]:
    """States of torch's generators: the CPU's, and those of every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng_states(states: dict[str, Tensor]) -> None:
    """Put back what `rng_states` returned; states of devices that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu" and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
