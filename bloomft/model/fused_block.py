"""BLOOM's block and its parts with fused operations: subclasses that `patch` swaps in and out."""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomBlock, BloomGelu, BloomMLP

from bloomft.model.plain_modules import is_plain
from lorakernels import (
    AttentionMask,
    LoRALinear,
    add_layer_norm,
    alibi_attention,
    frozen_linear,
    layer_norm_shrink,
)


class FusedInputs(NamedTuple):
    """Passed in place of transformers' alibi tensor when attention takes the fused path."""

    slopes: Tensor  # [heads] float32
    mask: AttentionMask | None  # of the rows' documents; None for queries that follow cached keys
    recompute_input: Callable[[], Tensor] | None = None  # of attention, in backward; None: saved instead
    shrunk: tuple[Tensor, Tensor] | None = None  # of attention's input, see `lora_linear`
    adds_residual: bool = True  # whether attention adds the residual to its output; else the block does


class FusedBloomAttention(BloomAttention):
    """BLOOM's attention through `alibi_attention`; transformers' own path for everything that needs it."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor | FusedInputs,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `BloomAttention.forward`; fused when ``alibi`` is a `FusedInputs`."""
        if not isinstance(alibi, FusedInputs):
            return super().forward(
                hidden_states,
                residual,
                alibi,
                attention_mask,
                layer_past,
                use_cache,
                output_attentions,
                **kwargs,
            )
        with _recomputed(hidden_states, alibi.recompute_input):
            if alibi.shrunk is None:
                fused = self.query_key_value(hidden_states)
            else:
                fused = self.query_key_value(hidden_states, alibi.shrunk)
        fused = fused.view(*fused.shape[:2], self.num_heads, 3, self.head_dim)
        # unbind, since its backward writes the three gradients into one tensor, in one pass
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(3))  # [B, heads, T, D] each
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)  # type: ignore[arg-type]  # never None in a model
        context = alibi_attention(query, key, value, alibi.slopes, mask=alibi.mask)
        context = context.transpose(1, 2).flatten(2)  # [B, T, H]
        output = nn.functional.dropout(self.dense(context), self.hidden_dropout, self.training)
        if not alibi.adds_residual:
            return output, None
        return _add_residual(self.dense, output, residual), None

    def is_fusable(self) -> bool:
        """Whether `alibi_attention` is what transformers computes with this module's settings."""
        dropout = self.attention_dropout
        return (
            is_plain(dropout, nn.Dropout)
            and not (dropout.training and dropout.p > 0)
            and not (self.slow_but_exact and self.pretraining_tp > 1)
            and (self.beta, self.inv_norm_factor) == (1.0, 1.0 / math.sqrt(self.head_dim))
        )


class FusedBloomBlock(BloomBlock):
    """BLOOM's block; the layer norm before query_key_value is recomputed in backward, not saved.

    On a GPU that layer norm and the first product of an adapted query_key_value are one operator, and so are
    attention's residual addition and the layer norm after it; the gradient of each layer norm is added to
    that of the residual by the kernel that makes it.

    Attributes:
        checkpoint: what runs all that follows attention, so that backward computes it again; None to save it.
    """

    checkpoint: Callable[..., Tensor] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | FusedInputs,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `BloomBlock.forward`; fused when ``alibi`` is a `FusedInputs`."""
        norm, normed, residual = self.input_layernorm, None, hidden_states
        adds_in_norm = False
        # A compiler decides for itself what to save, and fuses what it saves.
        if isinstance(alibi, FusedInputs) and not is_compiling():
            if is_plain(norm, nn.LayerNorm):
                alibi = alibi._replace(recompute_input=functools.partial(norm.forward, hidden_states))
            if self._shrinks_in_norm(hidden_states):
                normed, s, seed, residual = self._norm_and_shrink(hidden_states)
                alibi = alibi._replace(shrunk=(s, seed))
            # for one token the number of launches counts, and an operator in Python makes each slower
            adds_in_norm = layer_past is None and self._adds_in_norm(hidden_states)
            alibi = alibi._replace(adds_residual=not adds_in_norm)
        if normed is None:
            normed = norm(hidden_states)
        output, weights = self.self_attention(
            normed,
            normed if self.apply_residual_connection_post_layernorm else residual,
            alibi=alibi,
            attention_mask=attention_mask,
            layer_past=layer_past,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        # else it would take memory for as long as the block runs
        del normed
        run = self._feed_forward
        if self.checkpoint is not None and self.training:
            run = functools.partial(self.checkpoint, run)
        return run(output, residual if adds_in_norm else None), weights

    def _feed_forward(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """All that follows attention, whose output is hidden; residual is what is yet to be added to it."""
        norm = self.post_attention_layernorm
        if residual is None:
            normed = norm(hidden)
        else:
            backend = self._norm_backend()
            hidden, normed = add_layer_norm(
                hidden, residual, norm.weight, norm.bias, norm.eps, backend=backend
            )
        return self.mlp(normed, normed if self.apply_residual_connection_post_layernorm else hidden)

    def _shrinks_in_norm(self, hidden_states: Tensor) -> bool:
        """Whether `layer_norm_shrink` may stand for the input's layer norm."""
        attention = self.self_attention
        return (
            is_plain(attention, FusedBloomAttention)
            and is_plain(cast(nn.Module, attention.query_key_value), LoRALinear)
            and self._is_fusable(self.input_layernorm, hidden_states)
        )

    def _adds_in_norm(self, hidden_states: Tensor) -> bool:
        """Whether `add_layer_norm` may stand for attention's residual addition and the norm after it.

        Not where attention's input is the residual: with a checkpoint it would have to be saved.
        """
        return (
            not self.apply_residual_connection_post_layernorm
            and is_plain(self.self_attention, FusedBloomAttention)
            and self._is_fusable(self.post_attention_layernorm, hidden_states)
        )

    def _is_fusable(self, norm: nn.LayerNorm, hidden_states: Tensor) -> bool:
        """Whether an operator with more in it may stand for a layer norm.

        Not on a CPU, where there is nothing to gain; not where a hook may change or replace what the layer
        norm hands on, nor under autocast, where it is in float32.
        """
        backend = self._norm_backend()
        return (
            # a forced Triton runs on a CPU too, interpreted
            (hidden_states.is_cuda or backend == "triton")
            and backend in ("auto", "triton")
            and is_plain(norm, nn.LayerNorm)
            and norm.weight is not None
            and norm.bias is not None
            and _is_frozen(norm.weight, norm.bias)
            and norm.weight.dtype == norm.bias.dtype == hidden_states.dtype
            and not torch.is_autocast_enabled(hidden_states.device.type)
        )

    def _norm_backend(self) -> str:
        """The backend of what stands for layer norms: that of query_key_value's adapter, where it has one."""
        layer = cast(nn.Module, self.self_attention.query_key_value)
        return layer.backend if isinstance(layer, LoRALinear) else "auto"

    def _norm_and_shrink(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """The layer norm of the input, the shrink of query_key_value, its seed, and the input."""
        norm, layer = self.input_layernorm, cast(LoRALinear, self.self_attention.query_key_value)
        return layer_norm_shrink(
            hidden_states,
            norm.weight,
            norm.bias,
            norm.eps,
            layer.lora_a,
            layer.scale,
            dropout_p=layer.dropout_p,
            training=layer.training,
            backend=layer.backend,
            seed=layer.dropout_seed,
            return_x=True,
        )


class FusedBloomMLP(BloomMLP):
    """BLOOM's feed-forward layer with GELU in one pass each way, nothing saved but its input.

    BLOOM's 0.79788456 and torch's sqrt(2/pi) are the same float32.
    """

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """As `BloomMLP.forward`."""
        sliced = self.pretraining_tp > 1 and self.slow_but_exact
        if sliced or not is_plain(self.gelu_impl, BloomGelu):
            return super().forward(hidden_states, residual)
        inner, down = self.dense_h_to_4h(hidden_states), self.dense_4h_to_h
        if is_plain(down, FusedLinear) and _is_frozen(down.weight, down.bias):
            output = frozen_linear(inner, down.weight, down.bias, gelu=True)
        else:
            output = down(nn.functional.gelu(inner, approximate="tanh"))
        output = nn.functional.dropout(output, self.hidden_dropout, self.training)
        return _add_residual(down, output, residual)


class FusedLinear(nn.Linear):
    """A linear layer that, once frozen, saves nothing and multiplies in the faster precision."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N]."""
        weight, bias = self.weight, self.bias  # read once, since a parametrization recomputes it each time
        linear = frozen_linear if _is_frozen(weight, bias) else nn.functional.linear
        return linear(x, weight, bias)


def _is_frozen(weight: Tensor, bias: Tensor | None) -> bool:
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def takes_fused_inputs(block: nn.Module) -> bool:
    """Whether block, or what it wraps, hands `FusedInputs` to an attention that may use them."""
    attention = getattr(block, "self_attention", None)
    return isinstance(attention, FusedBloomAttention) and attention.is_fusable()


def _recomputed(
    output: Tensor, recompute: Callable[[], Tensor] | None
) -> contextlib.AbstractContextManager[object]:
    """Inside, ``recompute`` is saved for the backward pass in place of ``output``, and computes it there.

    Not under autocast, which would not be active in backward.
    """
    if recompute is None or torch.is_autocast_enabled(output.device.type):
        return contextlib.nullcontext()

    # weak, since the hooks live as long as what they have packed
    reference = weakref.ref(output)

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved is reference() else saved

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        with torch.no_grad():
            return recompute()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _add_residual(layer: nn.Module, output: Tensor, residual: Tensor) -> Tensor:
    """layer's output + residual, in place where that is safe.

    Not where autocast has made their dtypes differ, nor where others, such as hooks, may hold the output.
    """
    in_place = is_plain(layer, FusedLinear) and output.dtype == residual.dtype
    return output.add_(residual) if in_place else output + residual
