"""A run that is over soon, and the log of one that has not begun."""

from pathlib import Path

import pytest

from bloomft.config.loading import load_config
from bloomft.run.log import RunLog


@pytest.fixture
def short_run(run, settings):
    """Trains six steps without held-out text, saving at 2, 4 and 6, with changes as `run` takes them."""
    settings["optim"]["scheduler"] = {"num_training_steps": 6, "num_warmup_steps": 2, "name": "linear"}
    settings["train"] |= {"save_every_n_train_steps": 2, "eval_every_n_steps": 0}
    settings["data"]["heldout_fraction"] = 0.0
    return run


@pytest.fixture
def log_at(settings, config_path):
    """A `RunLog` of a run that goes on from a step, with overrides of its configuration."""
    Path(settings["train"]["output_dir"]).mkdir()
    return lambda step, *overrides: RunLog(load_config(config_path(settings), overrides), step)
