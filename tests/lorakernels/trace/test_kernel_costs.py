"""The model of a kernel's bytes, against every element that the interpreted kernel loads and stores."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from lorakernels import add_layer_norm, layer_norm_shrink, lora_linear
from lorakernels.ops.frozen_linear import check
from lorakernels.ops.frozen_linear import triton as frozen_linear
from lorakernels.ops.linear_cross_entropy import triton as cross_entropy
from lorakernels.ops.lora_linear.triton.tiles import Tile
from lorakernels.trace import kernel_costs
from lorakernels.trace.record import Launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts what Triton's interpreter loads"
)
M, N, K = 130, 96, 80


class Observed:
    """The elements that one launch touches, and what the model says of it."""

    def __init__(self, launch: Launch, arguments: dict) -> None:
        self.launch, self.arguments = launch, arguments
        self.loaded: dict[int, int] = {}
        self.stored: dict[int, int] = {}


@pytest.fixture
def observed() -> Iterator[list[Observed]]:
    """Every launch inside the test."""
    found: list[Observed] = []
    shipped_run, load, store = (
        InterpretedFunction.run,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def run(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launch = kernel_costs.launch_of(kernel.__name__, arguments, (*grid, 1, 1)[:3])
        found.append(Observed(launch, arguments))
        return shipped_run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def touched(pointers, mask) -> dict[int, int]:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses, chosen = np.broadcast_arrays(pointers.data, mask.data)
        return dict.fromkeys(addresses[chosen].tolist(), size)

    def observed_load(self, pointers, mask, *others, **options):
        found[-1].loaded |= touched(pointers, mask)
        return load(self, pointers, mask, *others, **options)

    def observed_store(self, pointers, value, mask, *others, **options):
        found[-1].stored |= touched(pointers, mask)
        return store(self, pointers, value, mask, *others, **options)

    with (
        patch.object(InterpretedFunction, "run", run),
        patch.object(InterpreterBuilder, "create_masked_load", observed_load),
        patch.object(InterpreterBuilder, "create_masked_store", observed_store),
    ):
        yield found


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_the_layer(observed, adapter_dtype):
    x, dy = (torch.randn(M, width, dtype=torch.bfloat16) for width in (K, N))
    weight, bias = torch.randn(N, K, dtype=torch.bfloat16), torch.randn(N, dtype=torch.bfloat16)
    lora_a, lora_b = torch.randn(16, K, dtype=adapter_dtype), torch.randn(N, 16, dtype=adapter_dtype)
    trained = [one.requires_grad_() for one in (x, lora_a, lora_b)]
    lora_linear(x, weight, bias, lora_a, lora_b, 2.0, backend="triton").backward(dy)
    assert all(one.grad is not None for one in trained)
    assert len(observed) == 10
    for one in observed:
        assert (sum(one.loaded.values()), sum(one.stored.values())) == (
            one.launch.read,
            one.launch.written,
        ), one.launch


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_the_layer_norm_with_a_shrink(observed, adapter_dtype):
    x, norm_weight, norm_bias = (torch.randn(*shape, K, dtype=torch.bfloat16) for shape in ((M,), (), ()))
    lora_a = torch.randn(16, K, dtype=adapter_dtype)
    layer_norm_shrink(x, norm_weight, norm_bias, 1e-5, lora_a, 2.0, backend="triton")
    (one,) = observed
    loaded, stored = sum(one.loaded.values()), sum(one.stored.values())
    assert (loaded, stored) == (one.launch.read, one.launch.written)
    parts = 2 if adapter_dtype == torch.float32 else 1
    assert one.launch.flops == parts * 2 * M * K * 16


@pytest.mark.parametrize("adds", [True, False])
def test_the_sum_with_its_layer_norm(observed, adds):
    x, residual, dt, dh = torch.randn(4, M, K).to(torch.bfloat16).unbind()
    weight, bias = torch.randn(2, K).to(torch.bfloat16).unbind()
    t, h = add_layer_norm(x.requires_grad_(), residual, weight, bias, 1e-5, backend="triton")
    torch.autograd.backward(*(([t, h], [dt, dh]) if adds else ([h], [dh])))
    assert len(observed) == 2
    for one in observed:
        loaded, stored = sum(one.loaded.values()), sum(one.stored.values())
        assert (loaded, stored) == (one.launch.read, one.launch.written), one.launch


@pytest.mark.parametrize("by_columns", [False, True])
def test_the_gradient_through_gelu(observed, by_columns):
    weight = torch.randn(N, K).bfloat16()
    problem = check.random_problem(M, weight.T.contiguous().T if by_columns else weight)
    frozen_linear.backward(*problem, tile=Tile(32, 64, 32, 4, 2))
    (one,) = observed
    assert (sum(one.loaded.values()), sum(one.stored.values())) == (one.launch.read, one.launch.written)
    assert one.launch.flops == 2 * M * N * K


def test_the_loss(observed):
    hidden, weight = torch.randn(12, 16), torch.randn(300, 16)
    labels = torch.randint(300, (12,))
    losses, statistics, _ = cross_entropy.forward(hidden, weight, labels, True)
    cross_entropy.weight_gradient(hidden, weight, labels, losses, statistics, torch.ones(12))
    forward, backward = observed
    assert sum(forward.loaded.values()) == forward.launch.read
    assert sum(forward.stored.values()) == forward.launch.written
    assert sum(backward.loaded.values()) == backward.launch.read
    assert sum(backward.stored.values()) == backward.launch.written
