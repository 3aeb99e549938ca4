"""What a run tells: metrics.jsonl, its log file, the terminal, and W&B or TensorBoard when asked."""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomft.config import Config, config_to_yaml, plain_values
from bloomft.errors import UserError
from bloomft.files import AppendedFile, write_atomically
from lorakernels import kernel_choices, kernel_report, use_kernel_choices

CONFIG, METRICS, KERNELS, WANDB_ID = "config.yaml", "metrics.jsonl", "kernels.json", "wandb-id"
RUN_FILES = (CONFIG, METRICS, KERNELS, WANDB_ID)  # those that are replaced whole


class RunLog:
    """Reports of one run in its folder; use it as a context manager.

    Args:
        config: the resolved configuration, written to ``config.yaml``.
        step: the step to go on from. Lines of ``metrics.jsonl`` beyond it belong to work that was lost with a
            crash and will be done again; they are removed.
    """

    def __init__(self, config: Config, step: int) -> None:
        self.folder = Path(config.train.output_dir)
        write_atomically(self.folder / CONFIG, config_to_yaml(config).encode())
        unreadable = _truncate_metrics(self.folder / METRICS, step)
        self._metrics = AppendedFile(self.folder / METRICS)
        self._log = AppendedFile(self.folder / "log")
        self._kernels: dict[str, Any] = {}
        self._board = _open_board(config, self.folder, step)
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
            if self._board is not None:
                self._board.close()

    def message(self, text: str) -> None:
        """One line on the terminal and, with the time, in the log file."""
        self._console.print(text, markup=False, soft_wrap=True)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    @contextmanager
    def evaluation(self) -> Iterator[Callable[[int, int], None]]:
        """A second bar while held-out rows are read; yields what takes the rows done and the rows in all."""
        task = self._bar.add_task("held-out row", total=None, status="")
        try:
            yield lambda done, rows: self._bar.update(task, completed=done, total=rows)
        finally:
            self._bar.remove_task(task)

    def record(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, the same in words, and the same to the chosen board."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._metrics.append(json.dumps(line) + "\n")
        words = _in_words(line)
        self._bar.update(self._task, completed=step, status=words)
        self._log.append(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} step {step}  {words}\n")
        if not self._console.is_terminal or "eval_loss" in line:
            self._console.print(f"step {step}  {words}", markup=False, soft_wrap=True)
        self.board(step, **values)

    def board(self, step: int, **values: float) -> None:
        """Values for W&B or TensorBoard alone."""
        if self._board is not None:
            self._board.write(step, values)

    def record_kernels(self) -> None:
        """Keep which implementation each operator took, before the step that used a new one counts.

        A run that goes on from here reads them back and computes the same bits.
        """
        if (choices := kernel_choices()) != self._kernels:
            self._kernels = choices
            write_atomically(self.folder / KERNELS, (json.dumps(choices, indent=1) + "\n").encode())
            self._log.append(f"{kernel_report()}\n")

    def sync(self) -> None:
        """Make everything written so far durable; a checkpoint that follows may rely on it."""
        self._metrics.sync()
        self._log.sync()
        if self._board is not None:
            self._board.flush()


def restore_kernel_choices(run_dir: Path) -> None:
    """Repeat the choices between implementations that a run made; `UserError` if its file is damaged."""
    path = run_dir / KERNELS
    if not path.exists():
        return
    try:
        use_kernel_choices(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read back ({error}); remove it to measure anew") from error


def _plain(value: float) -> float | int | None:
    # JSON has no NaN; null says that there was no finite figure.
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


class _Board(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps beyond the one to go on from were written before a crash and come again.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project="bloomft",
                name=folder.name,
                dir=str(folder),
                config=config,
                id=_wandb_id(folder),
                resume="allow",
            )
        except wandb.Error as error:
            raise UserError(
                f"train.logger=wandb: {error}; log in with `wandb login`, or choose none"
            ) from error

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """W&B sends what it was given on its own."""

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: Path) -> str:
    """The id of this folder's W&B run: drawn once, so that a run that goes on stays one run there."""
    path = folder / WANDB_ID
    try:
        known = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        known = ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not known:
        known = secrets.token_hex(8)
        write_atomically(path, f"{known}\n".encode())
    return known


def _open_board(config: Config, folder: Path, step: int) -> _Board | None:
    name = config.train.logger
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, step)
        return _Wandb(folder, plain_values(config))
    except ImportError as error:
        where = f"pip install 'bloomft[{name}]'"
        raise UserError(
            f"train.logger={name}: {error.name} is not installed; {where}, or choose none"
        ) from error
