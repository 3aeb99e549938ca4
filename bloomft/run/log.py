"""A run's output: metrics.jsonl, its log file, the terminal, and W&B or TensorBoard if configured."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bloomft.config.keys import Config
from bloomft.config.loading import config_to_yaml
from bloomft.errors import UserError
from bloomft.files import AppendedFile, write_atomically
from bloomft.progress import WIDTH, Task, duration, on_terminal, say, waiting
from bloomft.run.trackers import WANDB_ID, open_tracker
from lorakernels import kernel_report

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
RUN_FILES = (CONFIG, METRICS, WANDB_ID)  # those that are replaced as a whole


class RunLog:
    """Reports of one run in its folder; use it as a context manager.

    Args:
        config: the resolved configuration, written to ``config.yaml``.
        step: the step to resume from. Lines of ``metrics.jsonl`` beyond it belong to work that was lost in a
            crash and will be repeated; they are removed.
    """

    def __init__(self, config: Config, step: int) -> None:
        self.folder = config.train.run_dir
        write_atomically(self.folder / CONFIG, config_to_yaml(config).encode())
        unreadable = _truncate_metrics(self.folder / METRICS, step)
        self._metrics = AppendedFile(self.folder / METRICS)
        self._log = AppendedFile(self.folder / "log")
        self._kernels = ""
        self._tracker = open_tracker(config, self.folder, step)
        self._steps = config.optim.scheduler.num_training_steps, step
        self._bar: Task | None = None
        self._stack = ExitStack()
        if unreadable:
            self.message(f"{self.folder / METRICS}: unreadable lines removed: {unreadable}")

    def __enter__(self) -> "RunLog":
        total, done = self._steps
        self._bar = self._stack.enter_context(waiting("step", total, done=done))
        self._stack.enter_context(_kernel_messages(self.message))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        try:
            self.sync()
        finally:
            self._metrics.close()
            self._log.close()
            if self._tracker is not None:
                self._tracker.close()

    def message(self, text: str) -> None:
        """One line on the terminal and, with the time, in the log file."""
        say(text)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(step)

    def record(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, the same in words, and the same to the chosen tracker."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._metrics.append(json.dumps(line) + "\n")
        words = _in_words(line)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {'  '.join(words.values())}\n")
        if self._bar is not None:
            self._bar.status = "  ".join(words[name] for name in _ON_THE_BAR if name in words)
            left = self._bar.seconds_left()
            if left and step < self._steps[0]:
                words["left"] = f"{duration(left)} left"
        if not on_terminal() or "eval_loss" in line:
            say(fitting(words))
        self.track(step, **values)

    def track(self, step: int, **values: float) -> None:
        """Values for W&B or TensorBoard alone."""
        if self._tracker is not None:
            self._tracker.write(step, values)

    def kernels(self) -> None:
        """Which implementation each operator took, in the log file, if it has changed."""
        if (report := kernel_report()) != self._kernels:
            self._kernels = report
            self._log.append(f"{report}\n")

    def sync(self) -> None:
        """Make everything written so far durable; a checkpoint that follows may rely on it."""
        self._metrics.sync()
        self._log.sync()
        if self._tracker is not None:
            self._tracker.flush()


class NoLog(RunLog):
    """The log of a process that leaves it to process 0: nothing is written or shown."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def message(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def record(self, step: int, **values: float) -> None:
        """Nothing."""

    def track(self, step: int, **values: float) -> None:
        """Nothing."""

    def kernels(self) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


class _Lines(logging.Handler):
    """Hands the text of each record on."""

    def __init__(self, message: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._message = message

    def emit(self, record: logging.LogRecord) -> None:
        self._message(record.getMessage())


@contextmanager
def _kernel_messages(message: Callable[[str], None]) -> Iterator[None]:
    """What lorakernels reports of its progress, such as kernels that it compiles, while the block lasts."""
    logger, handler = logging.getLogger("lorakernels"), _Lines(message)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _plain(value: float) -> float | int | None:
    # JSON has no NaN; null says that the value was not finite.
    return value if isinstance(value, int) or math.isfinite(value) else None


_LABELS = {
    "step": "step {}",
    "loss": "loss {:.4f}",
    "eval_loss": "held-out {:.4f}",
    "lr": "lr {:.1e}",
    "grad_norm": "|grad| {:.2f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "skipped_steps": "{} steps skipped",
}
_ON_THE_BAR = ("loss", "tokens_per_second", "mfu")
# What a terminal's line leaves out first where it would be too long; the log file and metrics.jsonl have all.
_LEFT_OUT_FIRST = ("grad_norm", "lr", "skipped_steps", "left", "mfu", "tokens_per_second", "eval_loss")


def _in_words(line: dict[str, Any]) -> dict[str, str]:
    return {name: text.format(line[name]) for name, text in _LABELS.items() if line.get(name) is not None}


def fitting(words: dict[str, str]) -> str:
    """``words`` on one line of `WIDTH` columns, without the least important ones where they do not fit."""
    kept = dict(words)
    for name in _LEFT_OUT_FIRST:
        if len("  ".join(kept.values())) <= WIDTH:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())


def _truncate_metrics(path: Path, step: int) -> int:
    """Keep the lines of steps up to ``step``, and none at step 0; returns how many could not be read."""
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and 0 < at <= step]
    if b"".join(kept) != content:
        write_atomically(path, b"".join(kept))
    return steps.count(None)


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for one that a crash or something else has damaged."""
    try:
        at = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return at if type(at) is int else None
