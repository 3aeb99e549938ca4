"""What can be known to fail before a base model is loaded or downloaded."""

import importlib.util
import math
import os
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import BloomForCausalLM, get_scheduler

from bloomft.config import METRIC_SCHEDULES, Config, SchedulerConfig, filename_patterns
from bloomft.documents import list_files
from bloomft.errors import UserError
from bloomft.runtime import pick_device


def check_early(config: Config) -> None:
    """Raise `UserError` for a run that cannot succeed on this machine; takes milliseconds, writes nothing."""
    pick_device(config.train.device)
    logger = config.train.logger
    if logger not in ("none", *sys.modules) and importlib.util.find_spec(logger) is None:
        where = f"pip install 'bloomft[{logger}]'"
        raise UserError(f"train.logger={logger}: {logger} is not installed; {where}, or choose none")
    _check_schedule(config.optim.scheduler, config.optim.optimizer.lr)
    check_memory(config)
    for folder in (config.train.output_dir, config.data.cache_dir):
        check_folder(Path(folder))
    list_files(filename_patterns(config.data))


def check_memory(config: Config, model: BloomForCausalLM | None = None) -> None:
    """Raise `UserError` where this machine has less memory than a step takes at the very least.

    That is the token ids, labels and document ids of its rows; with the base ``model`` also the largest
    activation of a micro-batch in 16 bits, and the adapters with gradients and moments.
    """
    train, lora = config.train, config.model.lora
    rows = f"train.batch_size {train.batch_size} x data.max_length {config.data.max_length}"
    tokens = train.batch_size * (config.data.max_length if config.data.packing else 2)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needs = {f"{rows} x accumulate_grad_batches": (3 * 8 * tokens * train.accumulate_grad_batches, total)}
    if model is not None:
        device = pick_device(train.device)
        here = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total
        needs[rows] = 2 * 4 * model.config.hidden_size * tokens, here
        adapted = [
            layer.in_features + layer.out_features
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(f".{lora.attention_layer_name}")
        ]
        needs[f"model.lora.lora_dim {lora.lora_dim}"] = 4 * 4 * lora.lora_dim * sum(adapted), here
    for what, (least, available) in needs.items():
        if least > available:
            sizes = f"{least / 2**30:,.1f} GiB, there are {available / 2**30:,.1f}"
            raise UserError(f"{what}: takes at least {sizes}; lower it")


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless ``folder``, or the nearest folder above it that exists, can be written."""
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be a folder: {error.strerror}") from error
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{folder}: cannot be written: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: no permission to write into {nearest}")


def _check_schedule(settings: SchedulerConfig, lr: float) -> None:
    """Raise `UserError` where the schedule or its extra arguments fail at the first, middle or last step."""
    extra, total = settings.scheduler_specific_kwargs, settings.num_training_steps
    if extra and settings.name in ("constant", "constant_with_warmup"):
        raise UserError(f"optim.scheduler: {settings.name} takes no scheduler_specific_kwargs")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    try:
        schedule = get_scheduler(settings.name, optimizer, settings.num_warmup_steps, total, dict(extra))
        if settings.name in METRIC_SCHEDULES:
            for loss in (2.0, 1.0, 3.0):
                schedule.step(loss)
            factors = [optimizer.param_groups[0]["lr"]]
        else:
            steps = {0, settings.num_warmup_steps, total // 2, total - 1, total}
            factors = [schedule.lr_lambdas[0](step) for step in steps]
        if not all(math.isfinite(factor) for factor in factors):
            raise ValueError(f"it gives the factors {factors}")
    except Exception as error:  # the schedules check nothing themselves: text where a number is meant, say
        raise UserError(
            f"optim.scheduler: {settings.name}: {error}; see scheduler_specific_kwargs"
        ) from error
