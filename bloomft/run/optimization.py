"""The optimizer and the schedule of a run: created, checked early, and restored from a checkpoint."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import get_scheduler
from transformers.optimization import GreedyLR

from bloomft.config.keys import OptimConfig, SchedulerConfig
from bloomft.errors import UserError

# The first moves with every step, the others with the held-out loss.
Scheduler = LambdaLR | ReduceLROnPlateau | GreedyLR


def make_optimizer(model: nn.Module, settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``model``, all of them matrices of adapters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = settings.optimizer
    return torch.optim.AdamW(
        trainable,
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, settings: SchedulerConfig) -> Scheduler:
    """The schedule of ``optim.scheduler`` by transformers' `get_scheduler`; `UserError` where that fails."""
    try:
        return get_scheduler(
            settings.name,
            optimizer,
            num_warmup_steps=settings.num_warmup_steps,
            num_training_steps=settings.num_training_steps,
            scheduler_specific_kwargs=dict(settings.scheduler_specific_kwargs),
        )
    except Exception as error:  # the schedules check nothing themselves, e.g. text in place of a number
        raise _does_not_work(settings, error) from error


def check_schedule(settings: OptimConfig) -> None:
    """Raise `UserError` where the schedule or its extra arguments fail at the first, middle or last step."""
    schedule = settings.scheduler
    total = schedule.num_training_steps
    if schedule.scheduler_specific_kwargs and schedule.name in ("constant", "constant_with_warmup"):
        raise UserError(f"optim.scheduler: {schedule.name} takes no scheduler_specific_kwargs")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings.optimizer.lr)
    made = make_scheduler(optimizer, schedule)
    try:
        if isinstance(made, LambdaLR):
            steps = {0, schedule.num_warmup_steps, total // 2, total - 1, total}
            factors = [made.lr_lambdas[0](step) for step in steps]
        else:
            for loss in (2.0, 1.0, 3.0):
                made.step(loss)
            factors = [optimizer.param_groups[0]["lr"]]
        if not all(math.isfinite(factor) for factor in factors):
            raise ValueError(f"it gives the factors {factors}")
    except Exception as error:
        raise _does_not_work(schedule, error) from error


def restore_scheduler(
    scheduler: Scheduler, now: OptimConfig, state: dict[str, Any], rates: list[float], then: OptimConfig
) -> None:
    """Take a scheduler's progress from ``state`` and its settings from ``now``; set the learning rates.

    ``scheduler`` is fresh and made from ``now``; ``state`` was saved under the settings ``then``, when the
    optimizer's groups had the learning rates ``rates``. What differs between two fresh schedules, of
    then and of now, is a setting; the rest is progress.
    """
    base, base_then = now.optimizer.lr, then.optimizer.lr
    groups = scheduler.optimizer.param_groups
    fresh = scheduler.state_dict()
    like_then = torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)]} for _ in groups], lr=base_then
    )
    fresh_then = make_scheduler(like_then, then.scheduler).state_dict()
    kept = {key for key in fresh if key in state and fresh_then.get(key) == fresh[key]}
    scheduler.load_state_dict(fresh | {key: state[key] for key in kept})
    new_rates: list[float | Tensor]
    if isinstance(scheduler, LambdaLR):
        new_rates = [base * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    else:
        # The rate that the schedule had reached, in proportion, within the bounds of now.
        least = [min(bound, base) for bound in scheduler.min_lrs]
        most = [max(bound, base) for bound in getattr(scheduler, "max_lrs", [base] * len(groups))]
        moved = [rate * (base / base_then) for rate in rates]
        new_rates = [min(max(lr, low), high) for lr, low, high in zip(moved, least, most, strict=True)]
    for group, lr in zip(groups, new_rates, strict=True):
        group["lr"] = lr
    scheduler._last_lr = new_rates


def _does_not_work(settings: SchedulerConfig, error: Exception) -> UserError:
    return UserError(f"optim.scheduler: {settings.name}: {error}; see scheduler_specific_kwargs")
