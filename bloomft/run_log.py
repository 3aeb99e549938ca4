"""What a run tells: metrics.jsonl, its log file, the terminal, and W&B or TensorBoard when asked."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomft.config import Config, config_to_yaml
from bloomft.errors import UserError
from bloomft.files import make_folder, write_atomically
from lorakernels import dispatch

KERNELS = "kernels.json"


class RunLog:
    """Reports of one run in its folder; use it as a context manager.

    Args:
        config: the resolved configuration, written to ``config.yaml``.
        step: the step to go on from. Lines of ``metrics.jsonl`` beyond it belong to work that was lost with a
            crash and will be done again; they are removed.
    """

    def __init__(self, config: Config, step: int) -> None:
        self.folder = Path(config.train.output_dir)
        make_folder(self.folder)
        write_atomically(self.folder / "config.yaml", config_to_yaml(config).encode())
        _truncate_metrics(self.folder / "metrics.jsonl", step)
        try:
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._log = (self.folder / "log").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error
        self._kernels: dict[str, Any] = {}
        self._board = _open_board(config, self.folder)
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        total = config.optim.scheduler.num_training_steps
        self._task = self._bar.add_task("", total=total, completed=step, status="")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self.sync()
        self._metrics.close()
        self._log.close()
        if self._board is not None:
            self._board.close()

    def message(self, text: str) -> None:
        """One line on the terminal and, with the time, in the log file."""
        self._console.print(text, markup=False, soft_wrap=True)
        self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
        self._log.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step)

    def record(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, the same in words, and the same to the chosen board."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        words = _in_words(line)
        self._bar.update(self._task, completed=step, status=words)
        self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} step {step}  {words}\n")
        self._log.flush()
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
        if (choices := dispatch.choices()) != self._kernels:
            self._kernels = choices
            write_atomically(self.folder / KERNELS, (json.dumps(choices, indent=1) + "\n").encode())
            self._log.write(f"{dispatch.report()}\n")

    def sync(self) -> None:
        """Make everything written so far durable; a checkpoint that follows may rely on it."""
        for file in (self._metrics, self._log):
            file.flush()
            os.fsync(file.fileno())


def restore_kernel_choices(run_dir: Path) -> None:
    """Repeat the choices between implementations that a run made; `UserError` if its file is damaged."""
    path = run_dir / KERNELS
    if not path.exists():
        return
    try:
        dispatch.use_choices(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
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
}


def _in_words(line: dict[str, Any]) -> str:
    return "  ".join(text.format(line[name]) for name, text in _LABELS.items() if line.get(name) is not None)


def _truncate_metrics(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            break  # the crash cut this line off
    write_atomically(path, "".join(f"{line}\n" for line in kept if step).encode())


class _Board(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="bloomft", name=folder.name, dir=str(folder), config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _open_board(config: Config, folder: Path) -> _Board | None:
    name = config.train.logger
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            return _TensorBoard(folder)
        from omegaconf import OmegaConf

        return _Wandb(folder, OmegaConf.to_container(OmegaConf.create(config_to_yaml(config))))
    except ImportError as error:
        where = f"pip install 'bloomft[{name}]'"
        raise UserError(
            f"train.logger={name}: {error.name} is not installed; {where}, or choose none"
        ) from error
