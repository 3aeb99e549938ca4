"""W&B and TensorBoard, if configured."""

import secrets
from pathlib import Path
from typing import Any, Protocol

from bloomft.config.keys import Config
from bloomft.config.loading import plain_values
from bloomft.errors import UserError
from bloomft.files import write_atomically

WANDB_ID = "wandb-id"


class Tracker(Protocol):
    """Where the values of metrics.jsonl go in addition to it."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """The values of one step, by name."""

    def flush(self) -> None:
        """Make what was written durable."""

    def close(self) -> None:
        """The run is over."""


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps beyond the one to resume from were written before a crash and will be repeated.
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
        import wandb  # type: ignore[import-not-found, unused-ignore]  # an extra, not always installed

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
        """Nothing to do: W&B sends by itself what it was given."""

    def close(self) -> None:
        self._run.finish()


def _wandb_id(folder: Path) -> str:
    """The id of this folder's W&B run: drawn once, so that a resumed run stays one run there."""
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


def open_tracker(config: Config, folder: Path, step: int) -> Tracker | None:
    """The tracker of ``train.logger``; None for none. `UserError` where it is not installed or refuses."""
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
