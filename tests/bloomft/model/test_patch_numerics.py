"""Loss and every adapter gradient of a patched model against float64, by what its dtype costs at best."""

import copy
import math
import sys

import pytest
import torch

from benchmarks.baselines.rounded_model import ROUNDINGS, gradient_bound, round_modules
from benchmarks.interpreter import correct_bfloat16
from bloomft.model.patch import adapted_layers, patch_bloom
from lorakernels.tolerance import relative_error
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import interpreted, with_backend
from tests.bloomft.peft_models import with_peft

RANK, SCALE, TOKENS = 4, 2.0, 48
WIDEST = 256  # the longest sum, of the feed-forward layer


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


def theirs(model, values, *, upcast: bool):
    wrapped = with_peft(model, r=RANK, lora_alpha=SCALE * RANK, upcast=upcast)
    parameters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    return wrapped, load(parameters, values)


def patched(model, values):
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


def results(dtype: torch.dtype, seed: int, masked: int) -> tuple[list[torch.Tensor], ...]:
    """Loss and gradients: ours, in float64, in float64 with every module's result rounded, and of PEFT."""
    base = tiny_model(seed=seed, hidden_size=64, n_head=4, n_layer=3).to(dtype)
    values = adapters_like(base)
    ids = torch.randint(4, 384, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :masked] = -100
    exact = step(*theirs(copy.deepcopy(base).double(), values, upcast=False), ids, labels)
    rounded_model, parameters = theirs(copy.deepcopy(base).double(), values, upcast=False)
    rounded = step(round_modules(rounded_model, dtype), parameters, ids, labels)
    plain = step(*theirs(copy.deepcopy(base), values, upcast=True), ids, labels)
    return step(*patched(base, values), ids, labels), exact, rounded, plain


def gradient_failures(dtype: torch.dtype, ours, exact, rounded) -> list[str]:
    lines = []
    for index, (got, right, once) in enumerate(zip(ours[1:], exact[1:], rounded[1:], strict=True)):
        error, bound = relative_error(got, right), gradient_bound(right, once, dtype, WIDEST)
        if not error <= bound:
            lines.append(f"gradient {index}: {error:.2g} above {bound:.2g}")
    return lines


@pytest.mark.parametrize("masked", [0, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_near_to_float64_as_the_dtype_allows(dtype, masked):
    for seed in range(4):
        ours, exact, rounded, _ = results(dtype, seed, masked)
        assert gradient_failures(dtype, ours, exact, rounded) == []


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_so_are_those_of_the_kernels(dtype, monkeypatch):
    """Those in which layer norms make a shrink, add a residual and add its gradient."""
    correct_bfloat16()
    shipped = patched

    def by_kernels(model, values):
        model, parameters = shipped(model, values)
        return with_backend(model, "triton"), parameters

    monkeypatch.setattr(sys.modules[__name__], "patched", by_kernels)
    for seed in range(2):
        ours, exact, rounded, _ = results(dtype, seed, 20)
        assert gradient_failures(dtype, ours, exact, rounded) == []


@pytest.mark.parametrize("masked", [0, 20])
def test_float32_equals_the_unpatched_model_to_five_digits(masked):
    ours, _, _, plain = results(torch.float32, 0, masked)
    assert max(map(relative_error, ours, plain)) < 1e-5


def test_losses_are_as_near_to_float64_as_the_dtype_allows():
    """Over several models: the rounding of one loss is a draw of luck."""
    ours, rounded = [], []
    for seed in range(12):
        mine, exact, once, _ = results(torch.bfloat16, seed, 0)
        assert mine[0].dtype == torch.float32
        ours.append(relative_error(mine[0], exact[0]))
        rounded.append(relative_error(once[0], exact[0]))
    assert math.hypot(*ours) <= 1.1 * math.sqrt(ROUNDINGS) * math.hypot(*rounded)


def test_a_wrong_scale_is_seen(monkeypatch):
    _, exact, rounded, _ = results(torch.bfloat16, 1, 0)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 1.1 * SCALE)
    ours, *_ = results(torch.bfloat16, 1, 0)
    assert gradient_failures(torch.bfloat16, ours, exact, rounded) != []
