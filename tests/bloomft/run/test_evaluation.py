"""The held-out loss, bounded or not."""

import pytest
import torch

from bloomft.config.loading import load_config
from bloomft.data.loading import load_data
from bloomft.model.base import load_base, patch_base
from bloomft.run.evaluation import evaluate
from tests.bloomft.plain_transformers import heldout_loss


def test_held_out_loss_is_the_mean_over_labels(settings, config_path):
    config = load_config(config_path(settings))
    base = load_base(config.model.transformer)
    heldout = load_data(config.data, base.tokenizer).heldout
    expected = heldout_loss(base.model.eval(), heldout)
    patched = patch_base(base, config.model.lora, torch.device("cpu"), torch.float32)
    assert evaluate(patched, heldout, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_a_bounded_held_out_loss_is_the_same_for_every_batch_size(
    settings, config_path, monkeypatch, packing
):
    monkeypatch.setattr("bloomft.data.rows.EVAL_BATCH_TOKENS", 100)
    settings["data"] |= {"packing": packing, "heldout_fraction": 0.5}
    config = load_config(config_path(settings))
    base = load_base(config.model.transformer)
    heldout = load_data(config.data, base.tokenizer).heldout
    rows = heldout.eval_rows(3)
    tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in heldout.eval_batches(1, 3))
    assert 300 - 32 < tokens <= 300
    assert len(rows) < len(heldout)
    patched = patch_base(base, config.model.lora, torch.device("cpu"), torch.float32)
    bounded = evaluate(patched, heldout, 1, 3)
    for batch_size in (2, 3, 7, 100):
        assert evaluate(patched, heldout, batch_size, 3) == pytest.approx(bounded, rel=1e-6)
    assert evaluate(patched, heldout, 4) != pytest.approx(bounded, rel=1e-5)
