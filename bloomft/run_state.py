"""What changes while a run trains, in one object: made fresh, taken to a checkpoint and brought back."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import BloomForCausalLM, get_scheduler

from bloomft.base_identity import base_identity, check_base
from bloomft.checkpoint import TrainingState, restore_rng_states, rng_states
from bloomft.config import (
    METRIC_SCHEDULES,
    Config,
    OptimConfig,
    OptimizerConfig,
    SchedulerConfig,
    config_to_yaml,
)
from bloomft.errors import UserError
from bloomft.model import Base
from bloomft.patch import adapter_state, load_adapter_state

_MOMENTS = ("exp_avg", "exp_avg_sq")


class RunState:
    """Adapters, optimizer, schedule, scaler and counters of a run.

    Args:
        config: the resolved configuration.
        base: the frozen base that ``model`` was made from, and ``data`` the identity of the training rows:
            both only to be remembered and compared.
        model: the patched model, on its device.
        fp16: whether gradients are scaled.

    Attributes:
        step: optimizer steps done or, with fp16, left out by the scaler, which ``skipped`` counts.
        position: rows consumed.
        window_loss: float64 scalar on the device, loss times labels since the last line of metrics.jsonl,
            whose labels are counted in window_labels.
        base_eval_loss: held-out loss before the first step, None while it is not known.
    """

    def __init__(self, config: Config, base: Base, data: str, model: BloomForCausalLM, fp16: bool) -> None:
        self.config, self.base, self.data, self.model = config, base, data, model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.scheduler = make_scheduler(self.optimizer, config)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=fp16)
        self.step = self.skipped = self.position = self.window_labels = 0
        self.window_loss = torch.zeros((), dtype=torch.float64, device=model.device)
        self.base_eval_loss: float | None = None

    def snapshot(self) -> TrainingState:
        """The checkpoint of this moment; its tensors are not copied."""
        return TrainingState(
            step=self.step,
            position=self.position,
            adapters=adapter_state(self.model),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.scaler.state_dict(),
            rng=rng_states(),
            window={"loss": self.window_loss.item(), "labels": self.window_labels},
            base_eval_loss=self.base_eval_loss,
            config=config_to_yaml(self.config),
            lora=dataclasses.asdict(self.config.model.lora),
            base=base_identity(self.config.model.transformer, self.base.fingerprint),
            data=self.data,
        )

    def restore(self, state: TrainingState, path: Path) -> None:
        """Go on from ``state``, which ``path`` held; learning rates and the like follow the configuration.

        Raises `UserError` where it belongs to another run or does not fit this one.
        """
        try:
            then = _optim_config(state.config)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: does not fit this run: its configuration lacks {error}") from error
        self._check_same_run(state, then, path)
        try:
            self._check_fit(state)
            load_adapter_state(self.model, state.adapters)
            self._restore_optimizer(state)
            self._restore_schedule(state, dataclasses.replace(self.config, optim=then))
            restore_rng_states(state.rng)
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: does not fit this run: {error}") from error
        self.step, self.position = state.step, state.position
        self.skipped = self.step - self._steps_done()
        self.base_eval_loss = state.base_eval_loss
        self.window_loss += state.window["loss"]
        self.window_labels = state.window["labels"]

    def advance(self, rows: int) -> None:
        """Count the optimizer step that was just taken, of ``rows`` rows, and move a schedule of steps on.

        A step that fp16's scaler left out, which takes waiting for the device to know, leaves the schedule.
        """
        self.step, self.position = self.step + 1, self.position + rows
        skipped = self.step - self._steps_done() if self.scaler.is_enabled() else self.skipped
        if skipped == self.skipped and self.config.optim.scheduler.name not in METRIC_SCHEDULES:
            self.scheduler.step()
        self.skipped = skipped

    def _steps_done(self) -> int:
        """What the optimizer counts: the steps that changed the adapters."""
        moments = self.optimizer.state.get(self.parameters[0])
        return int(moments["step"]) if moments else 0

    def non_finite(self, grad_norm: Tensor) -> list[str]:
        """What of loss, gradients, adapters and optimizer state is not finite, by name; waits for the device.

        With fp16 a gradient norm may be: the scaler leaves that step out.
        """
        checked = {
            "the loss": [self.window_loss],
            "the gradient norm": [] if self.scaler.is_enabled() else [grad_norm],
            "an adapter": self.parameters,
            "the optimizer's state": [
                value for moments in self.optimizer.state.values() for value in moments.values()
            ],
        }
        checked = {name: tensors for name, tensors in checked.items() if tensors}
        finite = [
            torch.stack([tensor.isfinite().all() for tensor in checked[name]]).all() for name in checked
        ]
        return [name for name, fine in zip(checked, torch.stack(finite).tolist(), strict=True) if not fine]

    def _check_same_run(self, state: TrainingState, then: OptimConfig, path: Path) -> None:
        anew = "train.resume=never starts anew"
        check_base(state.base, self.config.model.transformer, self.base.fingerprint, path)
        if state.data != self.data:
            raise UserError(
                f"{path}: its training rows differ from those of this configuration (files, max_length, "
                "packing, heldout_fraction, random_state or split_state changed, or copies of a text stood "
                f"on both sides of the split); {anew}"
            )
        ours, theirs = dataclasses.asdict(self.config.model.lora), state.lora
        if changed := [k for k in ours if k != "lora_dropout" and ours[k] != theirs.get(k)]:
            raise UserError(
                f"{path}: model.lora.{changed[0]} is {theirs.get(changed[0])} there and {ours[changed[0]]} "
                f"in this configuration; {anew}"
            )
        was, name = then.scheduler.name, self.config.optim.scheduler.name
        if was != name:
            raise UserError(
                f"{path}: optim.scheduler.name is {was} there and {name} in this configuration; {anew}"
            )

    def _check_fit(self, state: TrainingState) -> None:
        """ValueError where torch would take what it is given and fail later, or read past its end."""
        # Keys with an underscore are torch's own, and other versions have others.
        _check_like(_public(state.scheduler), _public(self.scheduler.state_dict()), "scheduler")
        if state.scaler and self.scaler.is_enabled():
            _check_like(state.scaler, self.scaler.state_dict(), "scaler")
        _check_like(state.rng["cpu"], torch.get_rng_state(), "rng.cpu")
        groups, fresh = (
            [{key: group[key] for key in ("params", "lr")} for group in saved["param_groups"]]
            for saved in (state.optimizer, self.optimizer.state_dict())
        )
        _check_like(groups, fresh, "optimizer.param_groups")
        if [group["params"] for group in groups] != [group["params"] for group in fresh]:
            raise ValueError("optimizer.param_groups number other parameters")
        if not state.optimizer["state"]:
            return  # before the first step
        count = torch.zeros((), dtype=torch.float32)
        in_order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        expected = {
            index: {"step": count, **dict.fromkeys(_MOMENTS, parameter)}
            for index, parameter in enumerate(in_order)
        }
        _check_like(state.optimizer["state"], expected, "optimizer.state")

    def _restore_optimizer(self, state: TrainingState) -> None:
        """Moments from the checkpoint, everything else but the learning rates from the configuration."""
        groups = self.optimizer.param_groups
        configured = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state.optimizer)
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)

    def _restore_schedule(self, state: TrainingState, then: Config) -> None:
        """The schedule's progress from the checkpoint, its settings from the configuration, and the rates.

        ``then`` is the configuration with the checkpoint's ``optim``. What two fresh schedules, of then and
        of now, differ in is a setting; what they agree on has only moved since.
        """
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        base, base_then = self.config.optim.optimizer.lr, then.optim.optimizer.lr
        fresh = scheduler.state_dict()
        fresh_then = make_scheduler(make_optimizer(self.model, then), then).state_dict()
        kept = {key for key in fresh if key in state.scheduler and fresh_then.get(key) == fresh[key]}
        scheduler.load_state_dict(fresh | {key: state.scheduler[key] for key in kept})
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [base * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        else:
            # Where the schedule had taken the rate, in proportion, and within its bounds of now.
            least = [min(bound, base) for bound in scheduler.min_lrs]
            most = [max(bound, base) for bound in getattr(scheduler, "max_lrs", [base] * len(groups))]
            moved = [group["lr"] * (base / base_then) for group in state.optimizer["param_groups"]]
            rates = [min(max(lr, low), high) for lr, low, high in zip(moved, least, most, strict=True)]
        for group, lr in zip(groups, rates, strict=True):
            group["lr"] = lr
        scheduler._last_lr = rates


def _optim_config(config: str) -> OptimConfig:
    """The node ``optim`` of a checkpoint's configuration."""
    plain = yaml.safe_load(config)["optim"]
    return OptimConfig(OptimizerConfig(**plain["optimizer"]), SchedulerConfig(**plain["scheduler"]))


def make_optimizer(model: BloomForCausalLM, config: Config) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors and scalars get no weight decay."""
    settings = config.optim.optimizer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of ``optim.scheduler`` through transformers' `get_scheduler`."""
    settings = config.optim.scheduler
    try:
        return get_scheduler(
            settings.name,
            optimizer,
            num_warmup_steps=settings.num_warmup_steps,
            num_training_steps=settings.num_training_steps,
            scheduler_specific_kwargs=settings.scheduler_specific_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optim.scheduler: {settings.name}: {error}; see scheduler_specific_kwargs"
        ) from error


def _public(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.startswith("_")}


def _check_like(value: Any, fresh: Any, place: str) -> None:
    """Raise ValueError, naming the place, unless ``value`` has the structure of ``fresh``: the same keys,
    lengths, shapes and dtypes, finite tensors, and numbers where there are numbers."""
    if isinstance(fresh, dict) and isinstance(value, dict):
        if odd := sorted(map(str, value.keys() ^ fresh.keys())):
            raise ValueError(f"{place}.{odd[0]} is missing or too much")
        for key in fresh:
            _check_like(value[key], fresh[key], f"{place}.{key}")
    elif isinstance(fresh, list | tuple) and isinstance(value, list | tuple):
        if len(value) != len(fresh):
            raise ValueError(f"{place} has {len(value)} entries, expected {len(fresh)}")
        for index, (item, like) in enumerate(zip(value, fresh, strict=True)):
            _check_like(item, like, f"{place}.{index}")
    elif isinstance(fresh, Tensor) and isinstance(value, Tensor):
        if value.shape != fresh.shape or value.dtype != fresh.dtype:
            raise ValueError(f"{place} is {tuple(value.shape)} {value.dtype}, expected {tuple(fresh.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{place} is not finite")
    elif not (value is None or fresh is None or _are_alike(value, fresh)):
        raise ValueError(f"{place} is a {type(value).__name__}, expected a {type(fresh).__name__}")
    elif isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{place} is not a number")


def _are_alike(left: Any, right: Any) -> bool:
    return any(isinstance(left, kind) and isinstance(right, kind) for kind in (str, bool | int | float))
