"""Fine-tune BLOOM with LoRA: ``python -m bloomft.train CONFIG [key=value ...]``.

The same command run again goes on from ``last.ckpt``; on the same machine the result is bitwise that of a run
that was never interrupted.
"""

import dataclasses
import hashlib
import itertools
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import BloomForCausalLM, get_scheduler

from bloomft.accounting import BatchCounts, StepCost, gemm_rate, peak_memory
from bloomft.checkpoint import (
    LAST,
    TrainingState,
    check_base,
    find_checkpoint,
    load_checkpoint,
    restore_rng_states,
    rng_states,
    save_checkpoint,
)
from bloomft.config import METRIC_SCHEDULES, Config, config_to_yaml, filename_patterns, load_config
from bloomft.data import PackedDataset, split_documents
from bloomft.early_checks import check_early, check_memory
from bloomft.errors import UserError, run_command
from bloomft.files import make_folder
from bloomft.fused_model import checkpoint_blocks, compile_blocks
from bloomft.model import Base, load_base, patch_base, quiet_transformers
from bloomft.patch import adapted_layers, adapter_state, load_adapter_state
from bloomft.run_log import RunLog, restore_kernel_choices
from bloomft.runtime import pick_device, pick_dtype, setup_process
from bloomft.token_cache import build_token_cache


@dataclass
class TrainResult:
    """What a finished or interrupted run leaves behind.

    Attributes:
        step: optimizer steps done.
        base_eval_loss, eval_loss: held-out loss before the first step and after the last; None without
            held-out documents, eval_loss also None after an interruption.
    """

    step: int
    base_eval_loss: float | None
    eval_loss: float | None
    run_dir: Path


def train(config: Config) -> TrainResult:
    """Run the training that ``config`` describes, from the start or from its checkpoint.

    Raises `UserError` for whatever the user can mend. After Ctrl-C or SIGTERM the current step ends, is saved
    and the function returns.
    """
    check_early(config)
    device = pick_device(config.train.device)
    dtype = pick_dtype(config.train.precision, device)
    run_dir = Path(config.train.output_dir)
    resume_path = _resume_path(config, run_dir)
    make_folder(run_dir)
    base = load_base(config.model.transformer)
    check_memory(config, base.model)
    data, heldout, data_identity = load_data(config, base)
    torch.manual_seed(config.data.random_state)
    model = patch_base(base, config.model, device, dtype)
    checkpoint_blocks(model, config.train.gradient_checkpointing)
    if config.train.compile:
        compile_blocks(model)

    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config)
    follows_metric = config.optim.scheduler.name in METRIC_SCHEDULES
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    step, position, base_eval_loss = 0, 0, None
    window_loss, window_labels = torch.zeros((), dtype=torch.float64, device=device), 0
    cost, limit = StepCost.of(model), gemm_rate(device, dtype)
    if resume_path is not None:
        state = load_checkpoint(resume_path)
        _restore(state, resume_path, config, base, data_identity, model, optimizer, scheduler, scaler)
        step, position, base_eval_loss = state.step, state.position, state.base_eval_loss
        window_loss += state.window["loss"]
        window_labels = state.window["labels"]
        restore_kernel_choices(run_dir)

    def snapshot() -> TrainingState:
        return TrainingState(
            step=step,
            position=position,
            adapters=adapter_state(model),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            scaler=scaler.state_dict(),
            rng=rng_states(),
            window={"loss": window_loss.item(), "labels": window_labels},
            base_eval_loss=base_eval_loss,
            config=config_to_yaml(config),
            lora=dataclasses.asdict(config.model.lora),
            base={"name": base.name, "fingerprint": base.fingerprint},
            data=data_identity,
        )

    total = config.optim.scheduler.num_training_steps
    max_eval = config.train.eval_max_batches
    batch_size, accumulate = config.train.batch_size, config.train.accumulate_grad_batches
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    eval_loss = None
    with RunLog(config, step) as log, _stop_signals() as stop:
        for line in _describe(config, base, model, data, heldout, device, dtype, resume_path, step):
            log.message(line)
        if step == 0 and heldout is not None:
            base_eval_loss = evaluate(model, heldout, batch_size, max_eval)
            log.message(f"held-out loss of the base: {base_eval_loss:.4f}")
            log.board(0, eval_loss=base_eval_loss)

        model.train()
        for layer in adapted_layers(model).values():
            layer.prepare(batch_size * config.data.max_length)
        log.record_kernels()
        done, window_start = BatchCounts(), time.perf_counter()
        while step < total and not stop:
            batches = [data.batch(position + i, batch_size) for i in range(accumulate)]
            # Normalised over the whole accumulated batch, so that the loss does not depend on how it is cut.
            counts = sum((BatchCounts.of(batch) for batch in batches), BatchCounts())
            for batch in batches:
                loss = model(**_to_device(batch, device), num_items_in_batch=counts.labels).loss
                scaler.scale(loss).backward()
                window_loss += loss.detach() * counts.labels
                del loss  # its graph, spread over the heap, would leave the next one no room in between
            window_labels += counts.labels
            done += counts
            if step == 0:
                _check_gradients(model)
            log.record_kernels()
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.gradient_clip_val or math.inf)
            lr = optimizer.param_groups[0]["lr"]
            scaler.step(optimizer)
            scaler.update()
            if not follows_metric:
                scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            step, position = step + 1, position + accumulate
            log.advance(step)

            every = config.train.eval_every_n_steps
            evaluating = heldout is not None and (step == total or (every > 0 and step % every == 0))
            reporting = evaluating or step == total or step % config.train.log_every_n_steps == 0
            saving = stop or step == total or step % config.train.save_every_n_train_steps == 0
            if (reporting or saving) and not math.isfinite(
                window_loss + (0 if scaler.is_enabled() else grad_norm)
            ):
                raise UserError(
                    f"step {step}: loss {window_loss / window_labels}, gradient norm {grad_norm}; "
                    f"{run_dir / LAST} keeps the last good state, if any; try a lower optim.optimizer.lr"
                )
            if reporting:
                loss = window_loss.item() / window_labels
                seconds = time.perf_counter() - window_start
                values = {
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": grad_norm.item(),
                    "tokens_per_second": done.tokens / seconds,
                    "mfu": cost.flops(done) / seconds / limit,
                    "supervised_share": done.labels / done.tokens,
                    "peak_memory_gib": peak_memory(device) / 2**30,
                }
                if evaluating:
                    values["eval_loss"] = eval_loss = evaluate(model, heldout, batch_size, max_eval)
                    if follows_metric:
                        scheduler.step(eval_loss)
                log.record(step, **values)
                window_loss.zero_()
                window_labels, done, window_start = 0, BatchCounts(), time.perf_counter()

            if saving:
                log.sync()
                save_checkpoint(snapshot(), run_dir, keep=not stop)
        if stop and step < total:
            log.message(f"stopped after step {step}; the same command goes on from there")
        elif eval_loss is None and heldout is not None:
            eval_loss = evaluate(model, heldout, batch_size, max_eval)
        log.message(f"{run_dir / LAST} holds step {step} of {total}")
    return TrainResult(step, base_eval_loss, eval_loss, run_dir)


def load_data(config: Config, base: Base) -> tuple[PackedDataset, PackedDataset | None, str]:
    """Training rows, held-out rows (None where nothing is held out) and the identity of both."""
    settings = config.data
    if settings.max_length > base.tokenizer.model_max_length:
        raise UserError(
            f"data.max_length is {settings.max_length}, but the tokenizer of {base.name} allows at most "
            f"{base.tokenizer.model_max_length} tokens"
        )
    cache = build_token_cache(filename_patterns(settings), base.tokenizer, Path(settings.cache_dir))
    train_ids, heldout_ids = split_documents(
        cache.num_documents, settings.heldout_fraction, settings.random_state
    )
    rows = [
        PackedDataset(
            cache,
            ids,
            settings.max_length,
            packing=settings.packing,
            pad_token_id=base.pad_token_id,
            random_state=settings.random_state,
        )
        if len(ids)
        else None
        for ids in (train_ids, heldout_ids)
    ]
    settled = (
        cache.key,
        settings.max_length,
        settings.packing,
        settings.heldout_fraction,
        settings.random_state,
    )
    identity = hashlib.blake2b(repr(settled).encode(), digest_size=16).hexdigest()
    return rows[0], rows[1], identity


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


@torch.no_grad()
def evaluate(
    model: BloomForCausalLM, rows: PackedDataset, batch_size: int, max_batches: int | None = None
) -> float:
    """Mean loss over the labels of ``rows``, or of its first ``max_batches`` batches, in nats a token.

    Leaves the model's mode as it was.
    """
    was_training = model.training
    model.eval()
    total, labels = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in itertools.islice(rows.eval_batches(batch_size), max_batches):
        labels += int((batch["labels"] != -100).sum())
        batch = _to_device(batch, model.device)
        total += model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
    model.train(was_training)
    return total.item() / labels


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _resume_path(config: Config, run_dir: Path) -> Path | None:
    last = run_dir / LAST
    if config.train.resume == "auto":
        return last if last.exists() else None
    if config.train.resume != "never":
        return find_checkpoint(config.train.resume, run_dir)
    if last.exists():
        # A run from the start keeps its folder to itself; the earlier one moves aside whole.
        taken = (run_dir.with_name(f"{run_dir.name}.{n}") for n in range(1, 10**6))
        run_dir.rename(next(path for path in taken if not path.exists()))
    return None


def _restore(state, path, config, base, data_identity, model, optimizer, scheduler, scaler) -> None:
    """Put a checkpoint into the fresh objects of a run; learning rates and the like follow the config."""
    check_base(state, base.name, base.fingerprint, path)
    if state.data != data_identity:
        raise UserError(
            f"{path}: its training rows differ from those of this configuration (files, max_length, packing, "
            "heldout_fraction or random_state changed); train.resume=never starts anew"
        )
    ours, theirs = dataclasses.asdict(config.model.lora), state.lora
    if changed := [k for k in ours if k != "lora_dropout" and ours[k] != theirs.get(k)]:
        raise UserError(
            f"{path}: model.lora.{changed[0]} is {theirs.get(changed[0])} there and {ours[changed[0]]} in "
            "this configuration; train.resume=never starts anew"
        )
    if (was := OmegaConf.create(state.config).optim.scheduler.name) != config.optim.scheduler.name:
        raise UserError(
            f"{path}: optim.scheduler.name is {was} there and {config.optim.scheduler.name} in this "
            "configuration; train.resume=never starts anew"
        )
    load_adapter_state(model, state.adapters)
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state.optimizer)
    fresh = scheduler.state_dict()
    scheduler.load_state_dict(state.scheduler)
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update({k: v for k, v in settings.items() if k != "lr"})
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.base_lrs = fresh["base_lrs"]
        for group, lr, factor in zip(
            optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = lr * factor(scheduler.last_epoch)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    restore_rng_states(state.rng)


def _check_gradients(model: BloomForCausalLM) -> None:
    """Raise unless the first backward reached every adapter; checkpointing can cut them off in silence."""
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached {missing[0]} ({len(missing)} adapter tensors)")


def _describe(config, base, model, data, heldout, device, dtype, resume_path, step) -> Iterator[str]:
    adapted = model._patch_record.layers
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    yield f"base {base.name} ({base.fingerprint[:8]}), {str(dtype).removeprefix('torch.')} on {device}"
    yield (
        f"LoRA r={config.model.lora.lora_dim} scale={config.model.lora.lora_scale} on {len(adapted)} layers "
        f"({adapted[0]} ... {adapted[-1]}): {trainable:,} of {everything:,} parameters train"
    )
    held = f"{len(heldout)} rows held out" if heldout is not None else "nothing held out"
    yield (
        f"data: {len(data)} rows of at most {config.data.max_length} tokens, "
        f"{data.num_supervised_tokens:,} labels, {data.padding_fraction:.1%} padding; {held}"
    )
    if resume_path is not None:
        yield f"going on from {resume_path}, step {step}"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM; a second signal acts as if nobody caught it."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:
        pass  # not the main thread: whoever owns the process owns its signals
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG [key=value ...]."""
    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError("usage: python -m bloomft.train CONFIG [key=value ...]")
    config = load_config(arguments[0], arguments[1:])
    setup_process()
    quiet_transformers()
    train(config)


if __name__ == "__main__":
    run_command(main)
