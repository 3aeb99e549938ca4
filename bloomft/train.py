"""Fine-tune BLOOM with LoRA: ``python -m bloomft.train CONFIG [key=value ...]``.

The same command run again goes on from ``last.ckpt``; on the same machine the result is bitwise that of a run
that was never interrupted.
"""

if __name__ == "__main__":
    from bloomft.signals import watch_signals
    from bloomft.threads import share_cores

    # before torch is imported, which takes seconds and reads what share_cores sets
    watch_signals()
    share_cores()

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BloomForCausalLM

from bloomft.accounting import BatchCounts, StepCost, gemm_rate, peak_memory
from bloomft.arguments import parse_command
from bloomft.checkpoint import LAST, save_checkpoint
from bloomft.config import METRIC_SCHEDULES, Config, filename_patterns
from bloomft.data import PackedDataset, split_documents
from bloomft.early_checks import check_early, check_memory
from bloomft.errors import UserError, run_command
from bloomft.fused_model import checkpoint_blocks, compile_blocks
from bloomft.model import Base, load_base, patch_base, quiet_transformers
from bloomft.patch import adapted_layers
from bloomft.run_folder import Resumption, exclusive_folder, find_resumption
from bloomft.run_log import RunLog, restore_kernel_choices
from bloomft.run_state import RunState
from bloomft.runtime import pick_device, pick_dtype, setup_process
from bloomft.signals import EXIT_STOPPED, StopRequest, stop_signals
from bloomft.token_cache import build_token_cache


@dataclass
class TrainResult:
    """What a finished or interrupted run leaves behind.

    Attributes:
        step: optimizer steps done; last.ckpt in ``run_dir`` holds it.
        base_eval_loss, eval_loss: held-out loss before the first step and after the last; None without
            held-out documents, eval_loss also None after an interruption.
        stopped: whether a signal ended the run before its last step.
    """

    step: int
    base_eval_loss: float | None
    eval_loss: float | None
    run_dir: Path
    stopped: bool


def train(config: Config) -> TrainResult:
    """Run the training that ``config`` describes, from the start or from its checkpoint.

    After Ctrl-C or SIGTERM the step or evaluation under way ends, its state is saved and the function
    returns; before there is anything to save, `Stopped` is raised at once. Raises `UserError` for whatever
    the user can correct.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: training runs in one process; start it without torchrun"
        )
    check_early(config)
    device = pick_device(config.train.device)
    dtype = pick_dtype(config.train.precision, device)
    run_dir = Path(config.train.output_dir)
    with stop_signals() as stop, exclusive_folder(run_dir, anew=config.train.resume == "never") as notes:
        last = run_dir / LAST
        with stop.at_once(f"stopped before training began; {_kept(last)}; the same command starts again"):
            resumption = find_resumption(config)
            base = load_base(config.model.transformer)
            check_memory(config, base.model)
            data, heldout, data_identity = load_data(config, base)
            torch.manual_seed(config.data.random_state)
            model = patch_base(base, config.model, device, dtype)
            checkpoint_blocks(model, config.train.gradient_checkpointing)
            if config.train.compile:
                compile_blocks(model)
            run = RunState(config, base, data_identity, model, fp16=dtype == torch.float16)
            if resumption.state is not None:
                run.restore(resumption.state, resumption.path)
                restore_kernel_choices(run_dir)
        with RunLog(config, run.step) as log:
            for line in [*notes, *_describe(run, data, heldout, dtype, resumption)]:
                log.message(line)
            saved = run.step if resumption.path == last else None
            return _loop(run, data, heldout, log, stop, saved)


def _loop(
    run: RunState,
    data: PackedDataset,
    heldout: PackedDataset | None,
    log: RunLog,
    stop: StopRequest,
    saved: int | None,
) -> TrainResult:
    """The steps that are left; ``saved`` is the step that last.ckpt holds, None where there is none."""
    config, model, optimizer, scaler = run.config, run.model, run.optimizer, run.scaler
    device, last = model.device, log.folder / LAST
    total = config.optim.scheduler.num_training_steps
    follows_metric = config.optim.scheduler.name in METRIC_SCHEDULES
    batch_size, accumulate = config.train.batch_size, config.train.accumulate_grad_batches
    cost, limit = StepCost.of(model), gemm_rate(device, model.dtype)
    grad_norm = torch.zeros((), device=device)
    eval_loss = None

    def held_out_loss() -> float:
        with log.evaluation() as progress:
            return evaluate(model, heldout, batch_size, config.train.eval_max_batches, progress)

    def check_finite() -> None:
        if wrong := run.non_finite(grad_norm):
            kept = _kept(last) if saved is None else f"{last} still holds step {saved}"
            raise UserError(
                f"step {run.step}: not finite: {', '.join(wrong)} (loss "
                f"{run.window_loss.item() / max(run.window_labels, 1):.4g}, gradient norm "
                f"{grad_norm.item():.4g}); {kept}; try a lower optim.optimizer.lr"
            )

    def save(keep: bool) -> int:
        check_finite()
        log.sync()
        save_checkpoint(run.snapshot(), log.folder, keep=keep)
        return run.step

    if run.step == 0 and run.base_eval_loss is None and heldout is not None and not stop:
        run.base_eval_loss = held_out_loss()
        log.message(f"held-out loss of the base: {run.base_eval_loss:.4f}")
        log.board(0, eval_loss=run.base_eval_loss)
    model.train()
    for layer in adapted_layers(model).values():
        layer.prepare(batch_size * config.data.max_length)
    log.record_kernels()
    done, window_start = BatchCounts(), time.perf_counter()
    while run.step < total and not stop:
        batches = [data.batch(run.position + i * batch_size, batch_size) for i in range(accumulate)]
        # Normalised over the whole accumulated batch, so that the loss does not depend on how it is cut.
        counts = sum((BatchCounts.of(batch) for batch in batches), BatchCounts())
        for batch in batches:
            loss = model(**_to_device(batch, device), num_items_in_batch=counts.labels).loss
            scaler.scale(loss).backward()
            run.window_loss += loss.detach() * counts.labels
            del loss  # its graph, spread over the heap, would leave the next one no space in between
        run.window_labels += counts.labels
        done += counts
        if run.step == 0:
            _check_gradients(model)
        log.record_kernels()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.train.gradient_clip_val or math.inf)
        lr = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        run.advance(accumulate * batch_size)
        optimizer.zero_grad(set_to_none=True)
        log.advance(run.step)

        every = config.train.eval_every_n_steps
        evaluating = heldout is not None and (run.step == total or (every > 0 and run.step % every == 0))
        if evaluating or run.step == total or run.step % config.train.log_every_n_steps == 0:
            check_finite()
            loss = run.window_loss.item() / run.window_labels
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
            if scaler.is_enabled():
                values["skipped_steps"] = run.skipped
            if evaluating:
                values["eval_loss"] = eval_loss = held_out_loss()
                if follows_metric:
                    run.scheduler.step(eval_loss)
            log.record(run.step, **values)
            run.window_loss.zero_()
            run.window_labels, done, window_start = 0, BatchCounts(), time.perf_counter()
        if run.step == total or run.step % config.train.save_every_n_train_steps == 0:
            saved = save(keep=True)
    if saved != run.step:
        saved = save(keep=False)
    if run.step < total:
        log.message(f"stopped; {last} holds step {saved} of {total}; the same command goes on from there")
        return TrainResult(run.step, run.base_eval_loss, None, log.folder, stopped=True)
    if eval_loss is None and heldout is not None:
        eval_loss = held_out_loss()
    log.message(f"{last} holds step {saved} of {total}")
    return TrainResult(run.step, run.base_eval_loss, eval_loss, log.folder, stopped=False)


def load_data(config: Config, base: Base) -> tuple[PackedDataset, PackedDataset | None, str]:
    """Training rows, held-out rows (None where nothing is held out) and the identity of both."""
    settings = config.data
    if settings.max_length > base.tokenizer.model_max_length:
        raise UserError(
            f"data.max_length is {settings.max_length}, but the tokenizer of {base.name} allows at most "
            f"{base.tokenizer.model_max_length} tokens"
        )
    cache = build_token_cache(filename_patterns(settings), base.tokenizer, Path(settings.cache_dir))
    contents = cache.contents() if settings.heldout_fraction else np.arange(cache.num_documents)
    split_state = settings.random_state if settings.split_state is None else settings.split_state
    train_ids, heldout_ids = split_documents(contents, settings.heldout_fraction, split_state)
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
    # Only where they move a document, so that checkpoints from before they existed keep their rows.
    if split_state != settings.random_state:
        settled += (split_state,)
    if len(np.unique(contents)) < len(contents):
        settled += ("whole texts",)
    identity = hashlib.blake2b(repr(settled).encode(), digest_size=16).hexdigest()
    return rows[0], rows[1], identity


@torch.no_grad()
def evaluate(
    model: BloomForCausalLM,
    rows: PackedDataset,
    batch_size: int,
    max_batches: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean loss over the labels of ``rows``, or of a fixed random choice of them, in nats a token.

    The choice is `PackedDataset.eval_rows(max_batches)`, the same for every ``batch_size``. ``progress`` is
    called with the rows done and the rows in all. Leaves the model's mode as it was.
    """
    was_training = model.training
    model.eval()
    total, labels = torch.zeros((), dtype=torch.float64, device=model.device), 0
    done, num_rows = 0, len(rows.eval_rows(max_batches))
    for batch in rows.eval_batches(batch_size, max_batches):
        labels += int((batch["labels"] != -100).sum())
        done += len(batch["labels"])
        batch = _to_device(batch, model.device)
        total += model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        progress(done, num_rows)
    model.train(was_training)
    return total.item() / labels


def _kept(last: Path) -> str:
    """What a run that has not saved anything itself says of its folder."""
    return f"{last} is as it was" if last.exists() else "nothing is saved yet"


def _to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _check_gradients(model: BloomForCausalLM) -> None:
    """Raise unless the first backward reached every adapter; checkpointing can cut them off in silence."""
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if missing:
        raise RuntimeError(f"no gradient reached {missing[0]} ({len(missing)} adapter tensors)")


def _describe(
    run: RunState,
    data: PackedDataset,
    heldout: PackedDataset | None,
    dtype: torch.dtype,
    resumption: Resumption,
) -> Iterator[str]:
    model, config = run.model, run.config
    adapted = list(adapted_layers(model))
    trainable = sum(p.numel() for p in run.parameters)
    everything = sum(p.numel() for p in model.parameters())
    name = str(dtype).removeprefix("torch.")
    yield f"base {run.base.name} ({run.base.fingerprint[:8]}), {name} on {model.device}"
    yield (
        f"LoRA r={config.model.lora.lora_dim} scale={config.model.lora.lora_scale} on {len(adapted)} layers "
        f"({adapted[0]} ... {adapted[-1]}): {trainable:,} of {everything:,} parameters train"
    )
    held = f"{len(heldout)} rows held out" if heldout is not None else "nothing held out"
    yield f"data: {data.report.describe()}"
    yield (
        f"data: {len(data)} rows of at most {config.data.max_length} tokens, "
        f"{data.num_supervised_tokens:,} labels, {data.padding_fraction:.1%} padding; {held}"
    )
    yield from resumption.notes
    if resumption.path is not None:
        yield f"going on from {resumption.path}, step {run.step}"


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG [key=value ...]."""
    parser = argparse.ArgumentParser(
        prog="python -m bloomft.train", usage="%(prog)s CONFIG [key=value ...]", description=__doc__
    )
    parser.add_argument("config", help="the YAML file of the run")
    with stop_signals():
        _, config = parse_command(parser, arguments)
        setup_process()
        quiet_transformers()
        if train(config).stopped:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    run_command(main)
