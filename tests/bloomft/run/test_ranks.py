"""Several processes train one run as one does."""

import pytest
import torch

from bloomft.run.checkpoint import load_checkpoint
from tests.bloomft.launched import Launched
from tests.bloomft.run_folder import adapters, metrics

TOLERANCE = 1e-4


@pytest.fixture
def launch(settings, config_path, tmp_path):
    """Starts the run in several processes, with changes of its configuration as overrides."""

    def launch(size: int, *overrides: str, before=None) -> Launched:
        return Launched(size, config_path(settings), tmp_path / "errors", overrides, before)

    return launch


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("size", "batch_size", "accumulate", "dropout"), [(2, 2, 2, 0.1), (4, 1, 2, 0.0)])
def test_the_same_rows_on_several_processes(run, launch, tmp_path, size, batch_size, accumulate, dropout):
    alone = run(
        model__lora__lora_dropout=dropout,
        data__packing=False,
        train__batch_size=2,
        train__accumulate_grad_batches=4,
        optim__scheduler__num_training_steps=30,
        train__output_dir=str(tmp_path / "alone"),
    )
    together = tmp_path / "together"
    job = launch(
        size,
        f"train.output_dir={together}",
        f"train.batch_size={batch_size}",
        f"train.accumulate_grad_batches={accumulate}",
    )
    assert job.finish() == [0] * size, job.errors()
    for left, right in zip(metrics(alone.run_dir), metrics(together), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=TOLERANCE)
        assert right.get("eval_loss") == pytest.approx(left.get("eval_loss"), abs=TOLERANCE)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-3)
    close(adapters(together), adapters(alone.run_dir))
    ours, theirs = (load_checkpoint(folder / "last.ckpt") for folder in (together, alone.run_dir))
    assert ours.position == theirs.position == 30 * 8
    assert torch.equal(ours.rng["cpu"], theirs.rng["cpu"])
