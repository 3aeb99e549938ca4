"""Blocks compiled for the one shape that packed rows have, and beside it for all other shapes."""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomBlock

from bloomft.model.fused_block import FusedInputs
from lorakernels import choose_attention_kernels


def compile_blocks(model: BloomForCausalLM, shape: tuple[int, int] | None = None, **options: Any) -> None:
    """Compile one block for all layers: once with ``shape`` as a constant, once for all other shapes.

    shape is (rows, tokens) of the hidden states that come again and again, None where none does; a kernel
    that knows it may be several times faster. ``options`` are torch.compile's. Each of the two is compiled
    anew for the first block, whose input needs no gradient, and for calls without gradients; the one for
    other shapes also for a single row and a single token, which torch always takes as constants. Calls with
    a key-value cache run as they are, since every layer's cache would be a compilation. Attention takes the
    kernels that were measured to be fast, which happens before a compilation.
    """
    # functions of their own: with one cache, either could answer a call that the other was compiled for
    constant = torch.compile(_of_constant_shape, dynamic=False, **options)
    varying = torch.compile(_of_varying_shape, **options)

    def call(block: nn.Module, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        if named.get("layer_past") is not None:
            return type(block).forward(block, hidden, *arguments, **named)
        if isinstance(named.get("alibi"), FusedInputs):
            _choose_attention(cast(BloomBlock, block).self_attention, hidden)
        if hidden.shape[:2] == shape:
            return constant(block, hidden, *arguments, **named)
        _mark_as_varying(hidden, named.get("alibi"))
        return varying(block, hidden, *arguments, **named)

    for block in model.transformer.h:
        # not what nn.Module.compile sets: hooks, such as those that gather a sharded block, run uncompiled
        block.forward = functools.partial(call, block)


def _of_constant_shape(block: nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(block).forward(block, *arguments, **named)


def _of_varying_shape(block: nn.Module, *arguments: Any, **named: Any) -> Any:
    return type(block).forward(block, *arguments, **named)


def _choose_attention(attention: BloomAttention, hidden: Tensor) -> None:
    """Measure attention's kernels here, as far as they are new: a compiler that traces the block cannot."""
    batch, length, _ = hidden.shape
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    shape = batch, attention.num_heads, length, attention.head_dim
    choose_attention_kernels(shape, dtype, hidden.device, trained=torch.is_grad_enabled())


def _mark_as_varying(hidden: Tensor, alibi: object) -> None:
    """Rows and tokens vary from the first call on, so that one compilation serves them all."""
    mask = alibi.mask if isinstance(alibi, FusedInputs) else None
    torch._dynamo.maybe_mark_dynamic(hidden, [0, 1])
    for tensor in mask or ():
        torch._dynamo.maybe_mark_dynamic(tensor, list(range(tensor.ndim)))
