"""The split into training and held-out documents."""

from bloomft.config.loading import load_config
from bloomft.data.loading import load_data
from bloomft.model.base import load_base


def test_copies_of_a_text_are_held_out_together_or_not_at_all(settings, config_path, corpus):
    for index in range(40):
        (corpus / f"{index:02}.txt").write_text(f"The text number {index % 4} of four, again and again.")
    settings["data"]["packing"] = False
    config = load_config(config_path(settings))
    data = load_data(config.data, load_base(config.model.transformer).tokenizer)

    def texts(dataset):
        return {tuple(row.tolist()) for batch in dataset.eval_batches(1) for row in batch["input_ids"]}

    assert len(texts(data.train)) == 3
    assert len(texts(data.heldout)) == 1
    assert not texts(data.train) & texts(data.heldout)


def test_the_split_has_a_seed_of_its_own_and_defaults_to_random_state(settings, config_path):
    path = config_path(settings)

    def load(*overrides):
        config = load_config(path, overrides)
        data = load_data(config.data, load_base(config.model.transformer).tokenizer)
        return sorted(map(str, (batch["input_ids"] for batch in data.heldout.eval_batches(1)))), data.identity

    held, identity = load()
    assert load("data.split_state=42") == (held, identity)
    assert load("data.random_state=7", "data.split_state=42")[0] == held
    other, other_identity = load("data.split_state=7")
    assert other != held
    assert other_identity != identity
    assert load("data.random_state=7")[0] == other
