"""Fine-tune BLOOM with LoRA: ``python -m bloomft.train CONFIG [key=value ...]``.

The same command, run again, resumes from ``last.ckpt``; on the same machine the result is bitwise
identical to that of an uninterrupted run.
"""

if __name__ == "__main__":
    from bloomft.process import share_cores
    from bloomft.run.signals import watch_signals

    # before torch is imported, which takes seconds and reads what share_cores sets
    watch_signals()
    share_cores()

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomft.accounting import CONVENTION, BatchCounts, GemmLimit, StepCost, peak_memory
from bloomft.command_line import CommandParser, parse_command, run_command
from bloomft.config.keys import Config, TrainConfig
from bloomft.data.rows import PackedDataset
from bloomft.errors import EXIT_STOPPED, UserError
from bloomft.model.base import quiet_transformers
from bloomft.process import launched_processes, pick_device, setup_process
from bloomft.progress import waiting
from bloomft.ranks import join_ranks
from bloomft.run.checkpoint import LAST
from bloomft.run.early_checks import check_early
from bloomft.run.evaluation import evaluate
from bloomft.run.folder import exclusive_folder
from bloomft.run.log import NoLog, RunLog
from bloomft.run.setup import Job, set_up
from bloomft.run.signals import StopRequest, stop_signals
from bloomft.run.state import RunState


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

    After Ctrl-C or SIGTERM the current step or evaluation is finished, the state saved, and the function
    returns; before there is anything to save, `Stopped` is raised at once. Raises `UserError` for whatever
    the user can correct.
    """
    device = pick_device(config.train.device)
    run_dir = config.train.run_dir
    with (
        join_ranks(device, config.train.timeout_minutes) as ranks,
        stop_signals() as stop,
        contextlib.ExitStack() as stack,
    ):
        ranks.from_first(lambda: check_early(config))
        notes: list[str] = []
        if ranks.is_first:
            notes += stack.enter_context(exclusive_folder(run_dir, fresh=config.train.resume == "never"))
        kept = _kept(run_dir / LAST)
        with stop.at_once(f"stopped before training began; {kept}; the same command starts again"):
            job = set_up(config, device, ranks)
        log = stack.enter_context(RunLog(config, job.run.step) if ranks.is_first else NoLog())
        for line in [*notes, *job.notes]:
            log.message(line)
        eval_loss = _loop(job, config, log, stop)
    return TrainResult(
        job.run.step,
        job.run.base_eval_loss,
        eval_loss,
        run_dir,
        stopped=job.run.step < config.optim.scheduler.num_training_steps,
    )


def _loop(job: Job, config: Config, log: RunLog, stop: StopRequest) -> float | None:
    """The remaining steps. Returns the held-out loss after the last one, None where there is none."""
    run, rows, heldout, settings = job.run, job.data.train, job.data.heldout, config.train
    ranks = run.ranks
    total = config.optim.scheduler.num_training_steps
    batch_size, accumulate = settings.batch_size, settings.accumulate_grad_batches
    with waiting("measuring kernels"):
        # before the first evaluation: later its buffers would not fit the holes between the model's tensors
        cost = StepCost.of(run.model)
        limit = ranks.from_first(lambda: GemmLimit(run.model.device, run.model.dtype))
    if run.step == 0 and run.base_eval_loss is None and heldout is not None and not ranks.any(bool(stop)):
        run.base_eval_loss = _evaluate(job, heldout, settings)
        log.message(f"held-out loss of the base: {run.base_eval_loss:.4f}")
        log.track(0, eval_loss=run.base_eval_loss)
    with waiting("measuring kernels"):
        run.prepare(batch_size * config.data.max_length)
    for line in (limit.describe(), CONVENTION):
        log.message(line)
    eval_loss = None
    while run.step < total:
        # every process takes each so many-th micro-batch of the step's rows, which do not depend on how many
        numbers = range(ranks.rank, accumulate * ranks.size, ranks.size)
        batches = [rows.batch(run.position + number * batch_size, batch_size) for number in numbers]
        counts = sum((BatchCounts.of(batch) for batch in batches), BatchCounts())
        stops, *sums = ranks.total(bool(stop), counts.tokens, counts.labels, counts.pairs)
        if stops:
            break
        counts = BatchCounts(*sums)
        for batch in batches:
            run.forward_backward(batch, counts.labels)
        run.window.add(counts)
        run.reduce_gradients(settings.gradient_clip_val)
        lr = run.lr
        run.optimizer_step(accumulate * batch_size * ranks.size)
        log.advance(run.step)

        ends = run.step == total
        evaluated = heldout if ends or _is_due(settings.eval_every_n_steps, run.step) else None
        if evaluated is not None or ends or _is_due(settings.log_every_n_steps, run.step):
            run.collect_losses()
            _check_finite(job)
            values: dict[str, float] = {}
            if ranks.is_first:
                known = limit.rate
                values = _measured(run, lr, cost, limit)
                if limit.rate != known:
                    log.message(f"{limit.describe()} again")
            if evaluated is not None:
                values["eval_loss"] = eval_loss = _evaluate(job, evaluated, settings)
                run.step_on_metric(eval_loss)
            log.kernels()
            log.record(run.step, **values)
            run.window.clear()
        if ends or _is_due(settings.save_every_n_train_steps, run.step):
            _save(job, log, keep=True)
    if job.saved != run.step:
        _save(job, log, keep=False)
    if run.step < total:
        held = f"{job.last} holds step {job.saved} of {total}"
        log.message(f"stopped; {held}; the same command resumes from there")
        return None
    if eval_loss is None and heldout is not None:
        eval_loss = _evaluate(job, heldout, settings)
    log.message(f"{job.last} holds step {job.saved} of {total}")
    return eval_loss


def _measured(run: RunState, lr: float, cost: StepCost, limit: GemmLimit) -> dict[str, float]:
    """What a line of metrics.jsonl says of the steps of its window, the last one taken with ``lr``."""
    values = {
        "loss": run.window.mean_loss(),
        "lr": lr,
        "grad_norm": run.grad_norm.item(),
        **run.window.rates(cost, limit, run.ranks.size),
        "peak_memory_gib": peak_memory(run.model.device) / 2**30,
    }
    if run.scaler.is_enabled():
        values["skipped_steps"] = run.skipped
    return values


def _evaluate(job: Job, heldout: PackedDataset, settings: TrainConfig) -> float:
    run = job.run
    loss = evaluate(run.model, heldout, settings.batch_size, settings.eval_max_batches, run.ranks)
    run.agree_on_kernels()
    return loss


def _save(job: Job, log: RunLog, *, keep: bool) -> None:
    job.run.agree_on_kernels()
    job.run.collect_losses()
    _check_finite(job)
    log.sync()
    job.save(keep=keep)


def _check_finite(job: Job) -> None:
    run = job.run
    # process 0 alone knows the loss of all of them
    if run.ranks.is_first and (wrong := run.non_finite()):
        kept = _kept(job.last) if job.saved is None else f"{job.last} still holds step {job.saved}"
        raise UserError(
            f"step {run.step}: not finite: {', '.join(wrong)} (loss {run.window.mean_loss():.4g}, gradient "
            f"norm {run.grad_norm.item():.4g}); {kept}; try a lower optim.optimizer.lr"
        )


def _is_due(every: int, step: int) -> bool:
    """Whether something that is done every so many steps (0: never) is due after this one."""
    return every > 0 and step % every == 0


def _kept(last: Path) -> str:
    """The state of the folder of a run that has not saved anything yet itself."""
    return f"{last} is as it was" if last.exists() else "nothing is saved yet"


_ABOUT = """Fine-tune BLOOM with LoRA.

The same command, run again, resumes from last.ckpt in the run's folder,
runs/<name of CONFIG>. Exit status: 0 done, 2 a mistake to correct, 75 stopped
by a signal and saved."""
_EXAMPLES = {
    "configs/bloom-tiny.yaml": "a small model that needs no network and no text of yours",
    "configs/bloom-560m.yaml 'data.filenames=texts/*.md'": "your own text",
    "run.yaml train.gradient_checkpointing=true": "with less memory",
    "run.yaml train.resume=never": "from the start; the earlier run is moved aside",
}


def main(arguments: Sequence[str]) -> None:
    """The command: CONFIG [key=value ...]."""
    parser = CommandParser("train", "CONFIG [key=value ...]", _ABOUT, _EXAMPLES)
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    with stop_signals() as stop:
        _, config = parse_command(parser, arguments)
        setup_process()
        quiet_transformers()
        stopped = train(config).stopped
        if launched_processes() > 1:
            stop.ignore()  # the first process to end makes the launcher stop the others
        if stopped:
            sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    run_command(main)
