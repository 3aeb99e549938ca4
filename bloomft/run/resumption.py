"""Resuming a run: the checkpoint that its configuration asks for, and whether it belongs to this run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bloomft.config.keys import Config, OptimConfig, OptimizerConfig, SchedulerConfig
from bloomft.config.loading import config_to_yaml
from bloomft.errors import UserError
from bloomft.model.base_identity import check_base
from bloomft.run.checkpoint import (
    LAST,
    DamagedCheckpointError,
    TrainingState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
)
from bloomft.run.state import RunState


@dataclass
class Resumption:
    """A checkpoint and what it holds, both None at the start of a run; ``notes`` are lines for its log."""

    path: Path | None
    state: TrainingState | None
    notes: list[str]


@dataclass(frozen=True)
class RunIdentity:
    """Which run a checkpoint belongs to; the fields are those of `TrainingState`."""

    config: str
    lora: dict[str, Any]
    base: dict[str, str | None]
    data: str

    @classmethod
    def of(cls, config: Config, base: dict[str, str | None], data: str) -> "RunIdentity":
        """Of a resolved configuration, the identity of its base and that of its rows."""
        return cls(config_to_yaml(config), dataclasses.asdict(config.model.lora), base, data)


def find_resumption(config: Config) -> Resumption:
    """The checkpoint that ``train.resume`` asks for, read.

    "auto" is last.ckpt; if that is damaged or missing, the undamaged step-<n>.ckpt with the largest n. Raises
    `UserError` if there are checkpoints but none that can be used, or if it holds more steps than configured.
    """
    folder, resume = config.train.run_dir, config.train.resume
    if resume == "never":
        return Resumption(None, None, [])
    candidates = list_checkpoints(folder) if resume == "auto" else [find_checkpoint(resume, folder)]
    notes = []
    if resume == "auto" and candidates and candidates[0].name != LAST:
        notes.append(f"{folder / LAST} is missing")
    for path in candidates:
        try:
            state = load_checkpoint(path)
        except DamagedCheckpointError as error:
            notes.append(str(error))
            continue
        total = config.optim.scheduler.num_training_steps
        if state.step > total:
            raise UserError(
                f"optim.scheduler.num_training_steps is {total}, but {path} holds step {state.step}; "
                "raise it, or start anew with train.resume=never"
            )
        if state.kernels is None:
            notes.append(f"{path}: written by an earlier version, without kernel choices: measured anew")
        return Resumption(path, state, [*notes, f"going on from {path}, step {state.step}"])
    if notes:
        raise UserError(f"{notes[0]}; train.resume=never starts anew" if resume == "auto" else notes[0])
    return Resumption(None, None, [])


def resume(run: RunState, state: TrainingState, ours: RunIdentity, path: Path) -> None:
    """Resume from ``state``, read from ``path``; learning rates and the like follow the configuration.

    Raises `UserError` where it belongs to another run than ``ours`` or does not fit it.
    """
    try:
        then = _optim_config(state.config)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: does not fit this run: its configuration lacks {error}") from error
    _check_same_run(state, ours, path)
    was, name = then.scheduler.name, run.settings.scheduler.name
    if was != name:
        raise UserError(
            f"{path}: optim.scheduler.name is {was} there and {name} in this configuration; "
            "train.resume=never starts anew"
        )
    try:
        run.load_state_dict(vars(state), then)
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: does not fit this run: {error}") from error


def _check_same_run(state: TrainingState, ours: RunIdentity, path: Path) -> None:
    anew = "train.resume=never starts anew"
    check_base(state.base, ours.base, path)
    if state.data != ours.data:
        raise UserError(
            f"{path}: its training rows differ from those of this configuration (files, max_length, "
            "packing, heldout_fraction, random_state or split_state changed, or copies of a text were "
            f"on both sides of the split); {anew}"
        )
    for key, value in ours.lora.items():
        if key != "lora_dropout" and value != state.lora.get(key):
            raise UserError(
                f"{path}: model.lora.{key} is {state.lora.get(key)} there and {value} in this "
                f"configuration; {anew}"
            )


def _optim_config(config: str) -> OptimConfig:
    """The node ``optim`` of a checkpoint's configuration."""
    plain = yaml.safe_load(config)["optim"]
    return OptimConfig(OptimizerConfig(**plain["optimizer"]), SchedulerConfig(**plain["scheduler"]))
