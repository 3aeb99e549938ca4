import json

import pytest
import torch
from transformers import AutoTokenizer, BloomForCausalLM

from bloomft.model.base import EMBEDDED_BASE
from pretraining.__main__ import probe_loss

LIMIT = 12 * 2**20  # bytes


@pytest.fixture(scope="module")
def record():
    return json.loads((EMBEDDED_BASE / "recipe.json").read_text())


def test_the_loss_is_the_recorded_one(record):
    model = BloomForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_BASE)
    assert probe_loss(model, tokenizer) == pytest.approx(record["losses"]["probe"], abs=2e-3)
    assert model.num_parameters() == record["parameters"]


def test_the_files_are_small():
    assert sum(file.stat().st_size for file in EMBEDDED_BASE.iterdir()) < LIMIT


def test_every_source_has_a_version_and_a_licence(record):
    assert record["sources"]
    assert all(source["version"] and source["licence"] for source in record["sources"])
