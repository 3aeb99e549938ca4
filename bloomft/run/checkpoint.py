"""Checkpoints: everything a run needs to resume, and never the frozen base.

A checkpoint is one dictionary of tensors and plain values, a zip file as ``torch.save`` writes it, which
``torch.load(weights_only=True)`` reads. `TrainingState` lists its content. The zip's comment, its last
bytes, is a hash of all bytes before it, so that no damage goes unnoticed.
"""

import dataclasses
import hashlib
import io
import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bloomft.config.keys import LoraConfig
from bloomft.errors import UserError
from bloomft.files import write_atomically
from bloomft.process import PRECISIONS

FORMAT = 4
LAST = "last.ckpt"
STEP_FILE = re.compile(r"step-(\d+)\.ckpt")

_DIGEST_MARK = b"bloomft blake2b "
_DIGEST_BYTES = 32
_DIGEST_RECORD_BYTES = len(_DIGEST_MARK) + 2 * _DIGEST_BYTES
_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22


class DamagedCheckpointError(UserError):
    """The bytes of a checkpoint are not those that were written, or never were a checkpoint's."""


@dataclass
class TrainingState:
    """The state of a run after an optimizer step.

    Attributes:
        step: optimizer steps done.
        position: rows consumed, the place in the endless sequence of epochs.
        adapters: name to float32 tensor, every lora_a and lora_b.
        optimizer, scheduler, scaler: their state dicts; ``scaler`` is empty without fp16.
        rng: generator states by device, "cpu" and "cuda:<index>".
        window: loss sum and label count since the last line of metrics.jsonl.
        kernels: which implementation each operator took; None in files of formats 1 and 2.
        precision: of the frozen base, "fp32", "bf16" or "fp16"; None in files of formats 1 and 2.
        cuda_graph: whether steps were replayed from a CUDA graph; None on a CPU and in files of formats 1
            to 3.
        base_eval_loss: held-out loss before the first step, None without held-out documents.
        config: the resolved configuration as YAML.
        lora: rank, scale and what else shapes the adapters.
        base: name, revision, subfolder and fingerprint of the frozen base model.
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
    kernels: dict[str, Any] | None
    precision: str | None
    cuda_graph: bool | None
    base_eval_loss: float | None
    config: str
    lora: dict[str, Any]
    base: dict[str, str | None]
    data: str


def save_checkpoint(state: TrainingState, run_dir: Path, *, keep: bool) -> None:
    """Write ``last.ckpt`` and, with ``keep``, ``step-<n>.ckpt``, each by `write_atomically`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **fields}, buffer)
    _append_digest(buffer)
    if keep:
        write_atomically(run_dir / f"step-{state.step}.ckpt", buffer.getbuffer())
    write_atomically(run_dir / LAST, buffer.getbuffer())


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint onto the CPU.

    Files of format 1, which counted micro-batches and had no hash, of format 2, which had neither kernel
    choices nor precision, and of format 3, which did not tell of CUDA graphs, are converted. Raises
    `DamagedCheckpointError` if bytes have changed or it never was one, `UserError` if it cannot be read or
    holds what no run writes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint: {error.strerror}") from error
    has_digest = raw[-_DIGEST_RECORD_BYTES:].startswith(_DIGEST_MARK)
    try:
        if not (_digest_matches(raw) if has_digest else _is_intact_zip(raw)):
            raise ValueError("its bytes are not those that were written")
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the readers of zip and pickle raise anything
        raise DamagedCheckpointError(f"{path}: not a checkpoint of bloomft, or a damaged one") from error
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int:
        raise UserError(f"{path}: not a checkpoint of bloomft")
    if not 1 <= version <= FORMAT:
        raise UserError(f"{path}: checkpoint format {version}; this program reads formats 1 to {FORMAT}")
    if version > 1 and not has_digest:
        raise DamagedCheckpointError(f"{path}: a damaged checkpoint: the hash at its end is missing")
    if version < 3:
        content["kernels"] = content["precision"] = None
    if version < 4:
        content["cuda_graph"] = None
    names = {field.name for field in dataclasses.fields(TrainingState)}
    if not names <= content.keys():
        raise UserError(f"{path}: not a checkpoint of bloomft")
    wrong = [name for name, rule in _RULES.items() if not _holds(rule, content[name])]
    state = TrainingState(**{name: content[name] for name in names})
    if not wrong and not _ranks_agree(state):
        wrong = ["adapters"]
    if wrong:
        raise UserError(f"{path}: not a checkpoint of bloomft: no run writes such a value of {wrong[0]!r}")
    if version == 1:
        state.position *= yaml.safe_load(state.config)["train"]["batch_size"]
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """last.ckpt, then the step files of a run's folder from the latest to the first."""
    steps = [(int(found[1]), path) for path in folder.iterdir() if (found := STEP_FILE.fullmatch(path.name))]
    last = folder / LAST
    return [last] * last.exists() + [path for _, path in sorted(steps, reverse=True)]


def find_checkpoint(given: str, run_dir: Path) -> Path:
    """``given`` as it stands, or inside the run's folder if relative and not there; else `UserError`."""
    path = Path(os.path.expanduser(given))
    # Path.exists raises for a name that is too long
    if os.path.exists(path):
        return path
    inside = run_dir / path
    if not path.is_absolute() and os.path.exists(inside):
        return inside
    places = f"{path} or {inside}" if not path.is_absolute() else str(path)
    known = ", ".join(sorted(found.name for found in run_dir.glob("*.ckpt"))[:8])
    there = f"; {run_dir} has {known}" if known else f"; {run_dir} has no checkpoint yet"
    raise UserError(f"no checkpoint at {places}{there}")


def _append_digest(buffer: io.BytesIO) -> None:
    """Give the zip file in ``buffer`` its hash as the comment that its format allows at the end."""
    end = buffer.seek(-_ZIP_END_BYTES, os.SEEK_END)
    if bytes(buffer.getbuffer()[end : end + 4]) != _ZIP_END:
        raise RuntimeError("torch.save wrote a zip file with an unexpected end")
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_DIGEST_RECORD_BYTES.to_bytes(2, "little"))
    buffer.write(_DIGEST_MARK + _digest(buffer.getbuffer()))


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest().encode()


def _digest_matches(raw: bytes) -> bool:
    return raw[-2 * _DIGEST_BYTES :] == _digest(memoryview(raw)[:-_DIGEST_RECORD_BYTES])


def _is_intact_zip(raw: bytes) -> bool:
    """For files without a hash: the zip's checksums, which torch does not check."""
    if not raw.startswith(_ZIP_START):
        return False
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        return file.testzip() is None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_adapters(value: Any) -> bool:
    return bool(value) and all(
        name.endswith((".lora_a", ".lora_b"))
        and tensor.dtype == torch.float32
        and tensor.ndim == 2
        and bool(tensor.isfinite().all())
        for name, tensor in value.items()
    )


def _is_rng(value: Any) -> bool:
    return "cpu" in value and all(
        state.dtype == torch.uint8 and (name == "cpu" or name.removeprefix("cuda:").isdecimal())
        for name, state in value.items()
    )


def _is_config(value: Any) -> bool:
    plain = yaml.safe_load(value)
    return (
        isinstance(value, str)
        and isinstance(plain["optim"]["scheduler"]["name"], str)
        and 0 < plain["optim"]["optimizer"]["lr"] < math.inf
        and 0 < plain["train"]["batch_size"] < 2**31
    )


def _is_lora(value: Any) -> bool:
    known = LoraConfig(**value)
    return (
        known.lora_dim >= 1
        and math.isfinite(known.lora_scale)
        and 0 <= known.lora_dropout < 1
        and isinstance(known.attention_layer_name, str | list)
    )


# The rule of each field of a checkpoint, for `_holds`.
_RULES = {
    "step": _is_count,
    "position": _is_count,
    "adapters": _is_adapters,
    "optimizer": lambda value: {"state", "param_groups"} == value.keys(),
    "scheduler": lambda value: bool(value.keys()),
    "scaler": lambda value: isinstance(value, dict),
    "rng": _is_rng,
    "window": lambda value: math.isfinite(value["loss"]) and _is_count(value["labels"]),
    "kernels": lambda value: value is None or isinstance(value, dict),
    "precision": lambda value: value is None or value in PRECISIONS,
    "cuda_graph": lambda value: value is None or isinstance(value, bool),
    "base_eval_loss": lambda value: value is None or isinstance(value, float),
    "config": _is_config,
    "lora": _is_lora,
    "base": lambda value: all(isinstance(value[key], str) for key in ("name", "fingerprint")),
    "data": lambda value: isinstance(value, str),
}


def _holds(rule: Any, value: Any) -> bool:
    try:
        return bool(rule(value))
    except Exception:  # a value of a wrong type may raise anything
        return False


def _ranks_agree(state: TrainingState) -> bool:
    rank = state.lora.get("lora_dim", LoraConfig.lora_dim)
    return all(value.shape[0 if name.endswith("a") else 1] == rank for name, value in state.adapters.items())
