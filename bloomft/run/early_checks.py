"""Checks that a run must pass before its base model is loaded or downloaded."""

import importlib.util
import sys

import torch

from bloomft.config.keys import Config, filename_patterns
from bloomft.data.documents import list_files
from bloomft.errors import UserError
from bloomft.files import check_folder
from bloomft.process import check_memory
from bloomft.run.optimization import check_schedule


def check_early(config: Config) -> None:
    """Raise `UserError` for a run that cannot succeed on this machine; takes milliseconds, writes nothing."""
    logger = config.train.logger
    if logger not in ("none", *sys.modules) and importlib.util.find_spec(logger) is None:
        where = f"pip install 'bloomft[{logger}]'"
        raise UserError(f"train.logger={logger}: {logger} is not installed; {where}, or choose none")
    check_schedule(config.optim)
    train, data = config.train, config.data
    # the token ids, labels and document ids of a step, which are built on the CPU
    rows = train.batch_size * train.accumulate_grad_batches
    check_memory(
        f"train.batch_size {train.batch_size} x data.max_length {data.max_length} x accumulate_grad_batches",
        3 * 8 * rows * (data.max_length if data.packing else 2),
        torch.device("cpu"),
    )
    check_folder(config.train.run_dir)
    check_folder(config.data.token_cache_dir)
    list_files(filename_patterns(config.data))
