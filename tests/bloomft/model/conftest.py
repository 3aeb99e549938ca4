"""Models of several shapes, and how a patched one is compared with plain transformers."""

import collections
import copy
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomForCausalLM, Trainer, TrainingArguments

from bloomft.model import fused_block
from bloomft.model.compiled_blocks import compile_blocks
from bloomft.model.fused_classes import checkpoint_blocks
from bloomft.model.patch import adapted_layers, adapter_state, patch_bloom, unpatch_bloom
from lorakernels.tolerance import relative_error
from tests.bloomft.conftest import tiny_model

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on CPU tensors"
)
SHAPES = {
    "plain": {},
    "post_layernorm": {"apply_residual_connection_post_layernorm": True},
    "six_heads": {"n_head": 6, "hidden_size": 48},
    "three_heads": {"n_head": 3, "hidden_size": 48},
}


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def model(request) -> BloomForCausalLM:
    return tiny_model(**SHAPES[request.param])


def with_trained_adapters(model: BloomForCausalLM, **options) -> BloomForCausalLM:
    """Patched, with lora_b away from zero, so that the adapters matter."""
    patch_bloom(model, **{"r": 4, "scale": 2.0, **options})
    generator = torch.Generator().manual_seed(5)
    for name, value in adapter_state(model).items():
        if name.endswith("lora_b"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return model


def plain_twin(patched: BloomForCausalLM) -> BloomForCausalLM:
    """The same function as plain transformers: adapters added to the weights in float64."""
    twin = copy.deepcopy(patched).double()
    for layer in adapted_layers(twin).values():
        layer.weight.data += layer.scale * (layer.full_lora_b() @ layer.lora_a)
    return unpatch_bloom(twin).float()


def with_backend(model, backend: str):
    for layer in adapted_layers(model).values():
        layer.backend = backend
    return model


def step(model) -> list[torch.Tensor]:
    """The loss and the gradients of all adapters, under one dropout mask."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = tokens(2, 17)
    torch.manual_seed(0)
    loss = model(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, adapters)]


def calls_in_blocks(monkeypatch, operator: str) -> list[tuple[int, ...]]:
    """The shapes of x in every call that a block makes of the operator of that name."""
    seen, call = [], getattr(fused_block, operator)

    def counted(x, *arguments, **options):
        seen.append(tuple(x.shape))
        return call(x, *arguments, **options)

    monkeypatch.setattr(fused_block, operator, counted)
    return seen


class CountCalls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def check_compiled_blocks_do_not_call(calls: list, model, mode: bool) -> None:
    """The blocks of ``model``, compiled, have the results of before without the operator of ``calls``."""
    torch._dynamo.reset()
    checkpoint_blocks(model, mode)
    expected = step(model)
    calls.clear()
    compile_blocks(model, backend="aot_eager")
    for got, right in zip(step(model), expected, strict=True):
        close(got, right)
    assert calls == []
    torch._dynamo.reset()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random ids, without the special ones."""
    return torch.randint(4, 384, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    error = relative_error(actual.detach(), expected.detach())
    assert error < tolerance, f"relative error {error:.2e}"


def trainer(model, folder, options, **more) -> Trainer:
    """transformers' Trainer of two steps on four rows of 15 tokens."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "learning_rate": 0.1,
            "optim": "sgd",
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 2,
            **options,
        }
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 15, seed=3)]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **more)
