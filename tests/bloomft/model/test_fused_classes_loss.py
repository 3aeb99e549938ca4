"""The loss of a patched model is the one that unpatched transformers computes for the same call."""

import copy

import pytest
import torch
from torch import nn
from transformers import BloomForCausalLM

from bloomft.model.fused_classes import ignore_first_labels, rows_with_labels
from bloomft.model.patch import fuse_bloom
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import close, plain_twin, tokens, trainer, with_trained_adapters

B, T = 2, 15
IDS = tokens(B, T)


def labels_with(ignored: int) -> torch.Tensor:
    labels = tokens(B, T, seed=2)
    labels[0, :4] = ignored
    labels[1, 9] = ignored
    return labels


def smoothed(logits, labels, vocab_size, **options):
    """A loss that shifts its own labels and reads what it is given beside them."""
    assert vocab_size == logits.shape[-1]
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=options.get("smoothing", 0.2)
    )


LABELS = {"labels": labels_with(-100)}
SHIFTED = {"labels": labels_with(-100), "shift_labels": tokens(B, T, seed=9)}
CALLS = {
    "labels": LABELS,
    "int_items": {**LABELS, "num_items_in_batch": 7},
    "tensor_items": {**LABELS, "num_items_in_batch": torch.tensor(7)},
    "ignore_index": {"labels": labels_with(5), "ignore_index": 5},
    "ignore_index_and_items": {"labels": labels_with(5), "ignore_index": 5, "num_items_in_batch": 7},
    "shift_labels": SHIFTED,
    "shift_labels_and_ignore_index": {**SHIFTED, "shift_labels": labels_with(6), "ignore_index": 6},
    "shift_labels_and_items": {**SHIFTED, "num_items_in_batch": torch.tensor(7)},
    "last_logits": {"labels": LABELS["labels"][:, -6:], "logits_to_keep": 6},
    "chosen_logits": {"labels": LABELS["labels"][:, 3:8], "logits_to_keep": torch.arange(3, 8)},
    "masked_logits": {"labels": LABELS["labels"][IDS > 99], "logits_to_keep": IDS > 99},
    "unknown_keyword": {**LABELS, "smoothing": 0.3},
    "nothing_supervised": {"labels": torch.full((B, T), -100)},
}
MODES = {"train": (True, {}), "eval": (False, {}), "eval_without_logits": (False, {"skip_logits": True})}


@pytest.fixture(scope="module")
def pair() -> tuple[BloomForCausalLM, BloomForCausalLM]:
    """A patched model and plain transformers with the adapters in its weights."""
    patched = with_trained_adapters(tiny_model())
    return patched, plain_twin(patched)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("call", "custom"),
    # the custom loss takes labels by row
    [
        (call, custom)
        for custom in (False, True)
        for call in CALLS
        if not (custom and call == "masked_logits")
    ],
)
def test_every_call_has_transformers_loss(pair, call, mode, custom):
    training, extra = MODES[mode]
    patched, plain = (copy.deepcopy(model).train(training) for model in pair)
    arguments = CALLS[call]
    if custom:
        patched.loss_function = plain.loss_function = smoothed
    expected = plain(IDS, **arguments).loss
    actual = patched(IDS, **arguments, **extra).loss
    if call == "nothing_supervised":
        assert torch.isnan(expected)
        assert torch.isnan(actual)
    else:
        close(actual, expected, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_type_of_the_configuration_is_kept(pair, mode):
    training, extra = MODES[mode]
    patched, plain = (copy.deepcopy(model).train(training) for model in pair)
    for model in (patched, plain):
        model.loss_type = "ForMaskedLM"  # transformers' own, without a shift
    close(patched(IDS, labels=IDS, **extra).loss, plain(IDS, labels=IDS).loss, 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"vocab_size": 384},
        {"logits_to_keep": 6},
        {"ignore_index": None},
        {"ignore_index": 5, "labels": labels_with(-100)},
        {"shift_labels": tokens(B, T - 1)},
    ],
    ids=["vocab_size", "longer_labels", "no_ignore_index", "labels_out_of_range", "short_shift_labels"],
)
def test_what_transformers_refuses_is_refused(pair, arguments, mode):
    training, extra = MODES[mode]
    patched, plain = (model.train(training) for model in pair)
    arguments = {"labels": IDS, **arguments}
    with pytest.raises((TypeError, ValueError, IndexError)):
        plain(IDS, **arguments)
    with pytest.raises((TypeError, ValueError, IndexError)):
        patched(IDS, **arguments, **extra)


def test_a_head_that_does_more_than_project_is_called(pair):
    patched, plain = (copy.deepcopy(model).train() for model in pair)
    for model in (patched, plain):
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    close(patched(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss, 1e-6)


def test_the_fused_loss_makes_no_logits_for_what_it_knows(pair):
    patched = pair[0].train()
    for call in ("labels", "tensor_items", "ignore_index", "shift_labels", "last_logits"):
        assert patched(IDS, **CALLS[call]).logits is None
    assert patched(IDS, **CALLS["unknown_keyword"]).logits is not None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("call", "custom"),
    [
        *((call, False) for call in ("labels", "int_items", "shift_labels", "last_logits")),
        *((call, False) for call in ("ignore_index", "ignore_index_and_items")),
        *((call, True) for call in ("labels", "int_items", "shift_labels", "last_logits")),
    ],
)
def test_packed_documents_have_the_loss_of_documents_read_alone(pair, call, mode, custom):
    training, extra = MODES[mode]
    patched, plain = (copy.deepcopy(model).train(training) for model in pair)
    lengths = ([4, 1, 10], [8, 7])
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    )
    alone = [
        plain(part[None]).logits[0] for ids, row in zip(IDS, lengths, strict=True) for part in ids.split(row)
    ]
    logits = torch.cat(alone).view(B, T, -1)
    arguments = dict(CALLS[call])
    ignored, keep = arguments.get("ignore_index", -100), arguments.get("logits_to_keep", 0)
    labels = arguments["labels"].clone()
    for row, sizes in enumerate(lengths):
        for start in torch.tensor(sizes).cumsum(0)[:-1].tolist():
            if start - (T - labels.shape[1]) >= 0:
                labels[row, start - (T - labels.shape[1])] = ignored
    if custom:
        patched.loss_function = plain.loss_function = smoothed
    options = {name: arguments[name] for name in arguments.keys() - {"labels", "logits_to_keep"}}
    expected = plain.loss_function(logits[:, -keep:].contiguous(), labels, vocab_size=384, **options)
    actual = patched(IDS, document_ids=documents, use_cache=False, **arguments, **extra).loss
    close(actual, expected, 2e-6)


def test_a_document_s_first_label_is_ignored():
    labels = torch.tensor([[7, 8, -100, 9, 5]])
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert ignore_first_labels(labels, documents).tolist() == [[7, 8, -100, -100, 5]]
    assert ignore_first_labels(labels, documents, 3).tolist() == [[7, 8, -100, 3, 5]]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_that_are_named_change_nothing(pair, share):
    """The rows with a label and any others."""
    model = pair[0].train()
    labels, documents = labels_with(-100), (torch.arange(T) >= 7).int().expand(B, -1).contiguous()
    rows = rows_with_labels(labels, documents)
    shifted = nn.functional.pad(ignore_first_labels(labels, documents)[:, 1:], (0, 1), value=-100).flatten()
    assert (shifted[rows] != -100).all()
    assert len(rows) == (shifted != -100).sum()
    others = (shifted == -100).nonzero()[:, 0]
    rows = torch.cat([rows, others[: int(share * len(others))]]).sort().values
    for options in ({}, {"num_items_in_batch": torch.tensor(7)}):
        arguments = {"labels": labels, "document_ids": documents, "use_cache": False, **options}
        close(model(IDS, supervised_rows=rows, **arguments).loss, model(IDS, **arguments).loss, 1e-6)


def test_rows_that_are_named_are_left_to_the_fused_loss(pair):
    model = copy.deepcopy(pair[0]).train()
    model.loss_function = smoothed
    rows = rows_with_labels(IDS)
    assert torch.equal(model(IDS, labels=IDS, supervised_rows=rows).loss, model(IDS, labels=IDS).loss)


TRAINERS = {
    "plain": {},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}


def losses_and_weights(model, folder, options, **more):
    run = trainer(model, folder, options, **more)
    run.train()
    return run.state.log_history[-1]["train_loss"], run.evaluate()["eval_loss"], model.state_dict()


@pytest.mark.parametrize("name", TRAINERS)
def test_steps_of_a_real_trainer(tmp_path, name):
    theirs = losses_and_weights(tiny_model(), tmp_path / "theirs", TRAINERS[name])
    ours = losses_and_weights(fuse_bloom(tiny_model()), tmp_path / "ours", TRAINERS[name])
    assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
    for weight, value in theirs[2].items():
        close(ours[2][weight], value, 1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label_smoothing"])
def test_a_real_trainer_s_loss_of_a_patched_model(pair, tmp_path, options):
    losses = []
    for model in pair:
        run = trainer(copy.deepcopy(model).train(), tmp_path, options)
        for items in (None, torch.tensor(11)):
            losses.append(
                run.compute_loss(run.model, {"input_ids": IDS, "labels": IDS}, num_items_in_batch=items)
            )
    close(losses[0], losses[2], 1e-6)
    close(losses[1], losses[3], 1e-6)


def test_a_trainer_s_own_loss_function_sees_logits(pair, tmp_path):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return smoothed(outputs.logits, labels, 384)

    losses = [
        run.compute_loss(run.model, {"input_ids": IDS, "labels": IDS})
        for run in (trainer(copy.deepcopy(m).train(), tmp_path, {}, compute_loss_func=loss_of) for m in pair)
    ]
    close(losses[0], losses[1], 1e-6)
