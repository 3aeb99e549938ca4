"""The block that makes the layer norm and query_key_value's shrink in one operator, and where it does not.

Here the operator is the interpreted kernel, which backend "triton" forces on a CPU.
"""

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
    step,
    tokens,
    with_backend,
    with_trained_adapters,
)


@pytest.fixture
def calls(monkeypatch) -> list:
    return calls_in_blocks(monkeypatch, "layer_norm_shrink")


@interpreted
@pytest.mark.parametrize("mode", [False, True, "selective"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_results_are_those_of_two_operators(post_layernorm, dropout_p, mode, calls):
    model = with_trained_adapters(
        tiny_model(apply_residual_connection_post_layernorm=post_layernorm), dropout_p=dropout_p
    ).train()
    checkpoint_blocks(model, mode)
    apart, exact = step(model), step(model.double())
    assert calls == []
    for name, results in (("apart", apart), ("as one", step(with_backend(model.float(), "triton")))):
        for index, (got, right) in enumerate(zip(results, exact, strict=True)):
            error = float((got.double() - right).norm() / right.norm())
            # float32 with sums of up to 256 terms, through two blocks
            assert error < 2e-6, (name, index)
    assert calls == [(2, 17, model.config.hidden_size)] * (4 if mode is True else 2)


@interpreted
def test_results_of_evaluation_and_generation(calls):
    model = with_trained_adapters(tiny_model()).eval()
    ids = tokens(1, 6)
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    with_backend(model, "triton")
    close(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
    assert calls


@interpreted
def test_results_of_the_layer_norm_do_not_wait_for_the_backward_pass(calls):
    """What is saved is x, mean and rstd, not the layer norm of x."""
    model, saved = with_backend(with_trained_adapters(tiny_model()).train(), "triton"), []
    block = model.transformer.h[0]
    normed = []
    forward = type(block.self_attention).forward

    def keep(self, hidden_states, *arguments, **options):
        # kept, so that nothing else is saved at its address
        normed.append(hidden_states)
        return forward(self, hidden_states, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block.self_attention), "forward", keep)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = model(tokens(2, 32), labels=tokens(2, 32)).loss
    assert len(calls) == len(normed) == 2
    assert loss.requires_grad
    assert not {one.data_ptr() for one in saved} & {one.data_ptr() for one in normed}


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def frozen_no_more(model) -> None:
    for block in model.transformer.h:
        block.input_layernorm.weight.requires_grad_(True)


def without_bias(model) -> None:
    for block in model.transformer.h:
        norm = nn.LayerNorm(model.config.hidden_size, bias=False)
        block.input_layernorm = norm.requires_grad_(False)


CHANGES = {
    "adapters without a choice": lambda model: with_backend(model, "aten"),
    "hooks of the layer norm": lambda model: [hooked(b.input_layernorm) for b in model.transformer.h],
    "hooks of attention": lambda model: [hooked(b.self_attention) for b in model.transformer.h],
    "hooks of the layer": lambda model: [
        hooked(b.self_attention.query_key_value) for b in model.transformer.h
    ],
    "trained layer norms": frozen_no_more,
    "layer norms without bias": without_bias,
}


@interpreted
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_which_two_operators_are_called(name, calls):
    model = with_backend(with_trained_adapters(tiny_model()).train(), "triton")
    ids = tokens(2, 9)
    model(ids, labels=ids)
    assert len(calls) == 2
    CHANGES[name](model)
    model(ids, labels=ids)
    assert len(calls) == 2


@interpreted
def test_under_autocast_two_operators_are_called(calls):
    model = with_backend(with_trained_adapters(tiny_model()).train(), "triton")
    ids = tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids)
    assert calls == []


@interpreted
@pytest.mark.parametrize("mode", [False, True])
def test_compiled_blocks_call_two_operators(mode, calls):
    """A compiler would save what the block recomputes, the result of an operator that draws numbers."""
    model = with_backend(with_trained_adapters(tiny_model()).train(), "triton")
    check_compiled_blocks_do_not_call(calls, model, mode)


@pytest.mark.parametrize(
    ("backend", "dtype", "expected"),
    [
        ("auto", torch.float32, True),
        ("triton", torch.float32, True),
        ("aten", torch.float32, False),
        ("reference", torch.float32, False),
        # beside parameters in float32
        ("auto", torch.bfloat16, False),
    ],
)
def test_on_a_gpu_the_backend_decides(backend, dtype, expected):
    block = with_backend(with_trained_adapters(tiny_model()), backend).transformer.h[0]
    hidden = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))
    assert block._shrinks_in_norm(hidden) is expected


def test_a_plain_query_key_value_has_no_shrink():
    block = with_trained_adapters(tiny_model(), target="dense").transformer.h[0]
    hidden = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    assert not block._shrinks_in_norm(hidden)


def test_a_cpu_does_not_ask(calls):
    model = with_trained_adapters(tiny_model()).train()
    model(tokens(2, 9), labels=tokens(2, 9))
    assert calls == []
