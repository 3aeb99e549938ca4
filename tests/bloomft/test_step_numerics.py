"""Loss and every adapter gradient of a patched model against the unpatched model's, both against float64."""

import copy

import peft
import pytest
import torch

from bloomft.patch import adapted_layers, patch_bloom
from tests.bloomft.conftest import tiny_model

RANK, SCALE = 4, 2.0


def error(actual, exact) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def adapters_like(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = []
    for block in model.transformer.h:
        N, K = block.self_attention.query_key_value.weight.shape
        values += [
            torch.randn(RANK, K, generator=generator) * 0.2,
            torch.randn(N, RANK, generator=generator) * 0.2,
        ]
    return values


def with_peft(model, values, *, upcast: bool):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules=["query_key_value"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=upcast)
    parameters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    return wrapped, load(parameters, values)


def with_ours(model, values):
    patch_bloom(model, RANK, SCALE)
    parameters = [p for layer in adapted_layers(model).values() for p in (layer.lora_a, layer.lora_b)]
    return model, load(parameters, values)


def load(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return parameters


def step(model, parameters, ids, labels):
    model.train().zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in parameters)]


def errors(dtype: torch.dtype, seed: int, masked: int) -> tuple[list[float], list[float], list[float]]:
    """Of the loss and each gradient: ours and plain's against float64, and ours against plain's."""
    base = tiny_model(seed=seed, hidden_size=64, n_head=4, n_layer=3).to(dtype)
    values = adapters_like(base)
    ids = torch.randint(4, 384, (2, 48), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :masked] = -100
    exact = step(*with_peft(copy.deepcopy(base).double(), values, upcast=False), ids, labels)
    plain = step(*with_peft(copy.deepcopy(base), values, upcast=True), ids, labels)
    ours = step(*with_ours(base, values), ids, labels)
    pairs = ((ours, exact), (plain, exact), (ours, [value.double() for value in plain]))
    return tuple([error(a, b) for a, b in zip(left, right, strict=True)] for left, right in pairs)


@pytest.mark.parametrize("masked", [0, 20])
def test_float32_equals_the_unpatched_model_to_five_digits(masked):
    ours, plain, apart = errors(torch.float32, 0, masked)
    allowance = 4 * torch.finfo(torch.float32).eps
    assert all(mine <= 1.2 * theirs + allowance for mine, theirs in zip(ours, plain, strict=True))
    assert max(apart) < 1e-5


@pytest.mark.parametrize("masked", [0, 20])
def test_bfloat16_is_no_further_from_float64_than_the_unpatched_model(masked):
    # One model's rounding is a draw of luck; over several the better arithmetic shows.
    ours, plain = [], []
    for seed in range(4):
        mine, theirs, _ = errors(torch.bfloat16, seed, masked)
        ours += mine
        plain += theirs
    assert sum(e**2 for e in ours) <= sum(e**2 for e in plain)
