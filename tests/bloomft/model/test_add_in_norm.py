"""The block that adds attention's residual in the layer norm after it, and where it does not.

Here the operator is the interpreted kernel, which backend "triton" forces on a CPU.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bloomft.model.fused_classes import checkpoint_blocks
from tests.bloomft.conftest import tiny_model
from tests.bloomft.model.conftest import (
    calls_in_blocks,
    check_compiled_blocks_do_not_call,
    close,
    interpreted,
    plain_twin,
    step,
    tokens,
    with_backend,
    with_trained_adapters,
)


@pytest.fixture
def calls(monkeypatch) -> list:
    return calls_in_blocks(monkeypatch, "add_layer_norm")


def by_kernels(**changes):
    return with_backend(with_trained_adapters(tiny_model(**changes)).train(), "triton")


@interpreted
@pytest.mark.parametrize("mode", [False, True, "selective"])
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_loss_and_gradients_are_those_of_transformers(post_layernorm, mode, calls):
    model = by_kernels(apply_residual_connection_post_layernorm=post_layernorm)
    twin = plain_twin(model).double()
    checkpoint_blocks(model, mode)
    results = []
    for one in (model, twin):
        embeddings = one.get_input_embeddings()(tokens(2, 17)).detach().requires_grad_()
        loss = one(inputs_embeds=embeddings, labels=tokens(2, 17)).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, embeddings)])
    for got, right in zip(*results, strict=True):
        # float32 with sums of up to 256 terms, through two blocks
        close(got.double(), right, 2e-6)
    blocks = 0 if post_layernorm else 2
    # what checkpointing runs again
    assert calls == [(2, 17, model.config.hidden_size)] * (blocks if mode is False else 2 * blocks)


@interpreted
def test_a_gradient_of_a_residual_that_is_left_out_is_seen(monkeypatch):
    from lorakernels.ops import add_layer_norm as operator
    from lorakernels.ops import layer_norm_shrink as other

    expected = step(with_backend(by_kernels(), "aten"))
    shipped = operator.input_gradient

    def without_dt(dh, dt, *others):
        return shipped(dh, None, *others)

    for module in (operator, other):
        with monkeypatch.context() as patch:
            patch.setattr(module, "input_gradient", without_dt)
            got = step(by_kernels())
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
        assert errors[0] < 2e-6
        assert max(errors[1:]) > 1e-2


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def trained(norm: nn.LayerNorm) -> None:
    norm.weight.requires_grad_(True)


def blocks_of(model) -> list[nn.Module]:
    return list(model.transformer.h)


def without_bias(model) -> None:
    for block in blocks_of(model):
        norm = nn.LayerNorm(model.config.hidden_size, bias=False)
        block.post_attention_layernorm = norm.requires_grad_(False)


CHANGES = {
    "adapters without a choice": lambda model: with_backend(model, "aten"),
    "hooks of the layer norm": lambda model: [hooked(b.post_attention_layernorm) for b in blocks_of(model)],
    "hooks of attention": lambda model: [hooked(b.self_attention) for b in blocks_of(model)],
    "trained layer norms": lambda model: [trained(b.post_attention_layernorm) for b in blocks_of(model)],
    "layer norms without bias": without_bias,
}


@interpreted
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_which_attention_adds(name, calls):
    model, ids = by_kernels(), tokens(2, 9)
    model(ids, labels=ids)
    assert len(calls) == 2
    CHANGES[name](model)
    changed = model(ids, labels=ids)
    assert len(calls) == 2
    close(changed.loss, with_backend(copy.deepcopy(model), "aten")(ids, labels=ids).loss)


@interpreted
def test_hooks_of_attention_see_the_sum():
    seen = []
    for backend in ("aten", "triton"):
        model = with_backend(by_kernels(), backend)
        attention = model.transformer.h[0].self_attention
        attention.register_forward_hook(lambda module, arguments, output: seen.append(output[0].detach()))
        model(tokens(2, 9))
    close(*seen)


@interpreted
def test_hooks_of_other_modules_leave_it_and_see_what_they_saw(calls):
    seen = []
    for backend in ("aten", "triton"):
        model = with_backend(by_kernels(), backend)
        block = model.transformer.h[0]
        for module in (block, block.mlp, block.self_attention.dense):
            module.register_forward_hook(lambda module, arguments, output: seen.append(output))
        model(tokens(2, 9))
    assert len(calls) == 2
    for one, other in zip(seen[:3], seen[3:], strict=True):
        close(*(output if torch.is_tensor(output) else output[0] for output in (one, other)))


@interpreted
def test_generation_and_autocast_do_not_use_it(calls):
    model, ids = by_kernels().eval(), tokens(1, 6)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False)
    assert calls == []
    model(ids, use_cache=False)
    assert len(calls) == 2


@interpreted
@pytest.mark.parametrize("mode", [False, True])
def test_compiled_blocks_do_not_use_it(mode, calls):
    """A compiler fuses them itself."""
    check_compiled_blocks_do_not_call(calls, by_kernels(), mode)


@pytest.mark.parametrize(
    ("target", "backend", "dtype", "expected"),
    [
        ("query_key_value", "auto", torch.float32, True),
        ("query_key_value", "triton", torch.float32, True),
        ("query_key_value", "aten", torch.float32, False),
        ("query_key_value", "reference", torch.float32, False),
        # beside parameters in float32
        ("query_key_value", "auto", torch.bfloat16, False),
        ("dense", "auto", torch.float32, True),
    ],
)
def test_on_a_gpu_the_backend_decides(target, backend, dtype, expected):
    block = with_backend(with_trained_adapters(tiny_model(), target=target), backend).transformer.h[0]
    hidden = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))
    assert block._adds_in_norm(hidden) is expected


def test_a_cpu_does_not_use_it(calls):
    model = with_trained_adapters(tiny_model()).train()
    model(tokens(2, 9), labels=tokens(2, 9))
    assert calls == []
