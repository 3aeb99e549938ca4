"""A run's output: metrics.jsonl, its log file, the terminal, and W&B or TensorBoard if configured."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomft.config.keys import Config
from bloomft.config.loading import config_to_yaml
from bloomft.errors import UserError
from bloomft.files import AppendedFile, write_atomically
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
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        total = config.optim.scheduler.num_training_steps
        self._task = self._bar.add_task("step", total=total, completed=step, status="")
        if unreadable:
            self.message(f"{self.folder / METRICS}: unreadable lines removed: {unreadable}")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        try:
            self.sync()
        finally:
            self._metrics.close()
            self._log.close()
            if self._tracker is not None:
                self._tracker.close()

    def message(self, text: str) -> None:
        """One line on the terminal and, with the time, in the log file."""
        self._console.print(text, markup=False, soft_wrap=True)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[int, int], None]]:
        """A second bar while held-out rows are read; yields what takes the rows done and their total."""
        task = self._bar.add_task("held-out row", total=None, status="")
        try:
            yield lambda done, rows: self._bar.update(task, completed=done, total=rows)
        finally:
            self._bar.remove_task(task)

    def record(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, the same in words, and the same to the chosen tracker."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._metrics.append(json.dumps(line) + "\n")
        words = _in_words(line)
        self._bar.update(self._task, completed=step, status=words)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} step {step}  {words}\n")
        if not self._console.is_terminal or "eval_loss" in line:
            self._console.print(f"step {step}  {words}", markup=False, soft_wrap=True)
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


def _plain(value: float) -> float | int | None:
    # JSON has no NaN; null says that the value was not finite.
    return value if isinstance(value, int) or math.isfinite(value) else None


_LABELS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "|grad| {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "skipped_steps": "{} steps skipped",
}


def _in_words(line: dict[str, Any]) -> str:
    return "  ".join(text.format(line[name]) for name, text in _LABELS.items() if line.get(name) is not None)


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
