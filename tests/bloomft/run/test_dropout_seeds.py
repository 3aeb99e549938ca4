"""Every layer's dropout follows the one seed of the micro-batch, however the step is computed."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.model.patch import adapted_layers
from bloomft.ranks import Ranks
from bloomft.run.dropout_seeds import DropoutSeeds
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import tokens, with_trained_adapters

CPU = torch.device("cpu")


def seeded_model(dropout_p: float = 0.3):
    model = with_trained_adapters(tiny_model(n_layer=3), dropout_p=dropout_p).train()
    return model, DropoutSeeds(adapted_layers(model).values(), CPU)


def gradients_of(model) -> list[torch.Tensor]:
    ids = tokens(2, 17)
    loss = model(ids, labels=ids).loss
    return list(torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad]))


def test_seeds_are_distinct_and_aligned_and_keep_their_places():
    model, seeds = seeded_model()
    layers = adapted_layers(model).values()
    places, seen = [layer.dropout_seed.data_ptr() for layer in layers], []
    for number in (0, 1, 2**63 - 1):
        seeds.set(torch.tensor([number]))
        seen += [layer.dropout_seed.item() for layer in layers]
        assert seen[-3] == number
    assert len(set(seen)) == 9
    assert places == [layer.dropout_seed.data_ptr() for layer in layers]
    assert all((place - places[0]) % 16 == 0 for place in places)


def test_the_seed_of_a_micro_batch_follows_torch_s_generator():
    _, seeds = seeded_model()
    torch.manual_seed(5)
    drawn = [seeds.draw(Ranks()).item() for _ in range(4)]
    torch.manual_seed(5)
    assert drawn == [seeds.draw(Ranks()).item() for _ in range(4)]
    assert len(set(drawn)) == 4


def test_several_processes_share_the_seeds_of_one():
    _, seeds = seeded_model()
    drawn = []
    for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2)):
        torch.manual_seed(5)
        drawn.append([seeds.draw(ranks).item() for _ in range(4 // ranks.size)])
    alone, first, second = drawn
    assert (first, second) == (alone[::2], alone[1::2])


def test_without_dropout_there_are_no_seeds():
    model, seeds = seeded_model(dropout_p=0.0)
    assert not seeds.used
    assert all(layer.dropout_seed is None for layer in adapted_layers(model).values())


@pytest.mark.parametrize("mode", [True, "selective"])
def test_recomputed_blocks_have_the_same_masks_without_random_states(mode, monkeypatch):
    model, seeds = seeded_model()
    seeds.set(torch.tensor([9]))
    expected = gradients_of(model)
    checkpoint_blocks(model, mode, preserve_rng_state=False)

    def refuse(*_):
        raise AssertionError("a random state is asked for, which a capture does not allow")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    assert all(map(torch.equal, gradients_of(model), expected))
    seeds.set(torch.tensor([10]))
    assert not any(map(torch.equal, gradients_of(model), expected))
    checkpoint_blocks(model, mode)
    with pytest.raises(AssertionError, match="a random state is asked for"):
        gradients_of(model)


@pytest.mark.parametrize("mode", [False, True])
def test_compiled_blocks_have_the_same_masks_and_are_compiled_once(mode):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, seeds = seeded_model()
    seeds.set(torch.tensor([9]))
    expected = gradients_of(model)
    checkpoint_blocks(model, mode, preserve_rng_state=False)
    compile_blocks(model, backend=counter)
    for seed in (3, 9):
        seeds.set(torch.tensor([seed]))
        results = gradients_of(model)
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-7)
    # the first block is compiled apart, since its input needs no gradient
    assert counter.frame_count <= 2
    torch._dynamo.reset()
