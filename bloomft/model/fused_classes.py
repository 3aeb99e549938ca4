"""BLOOM's trunk and its loss with fused operations: subclasses that `patch` swaps in and out."""

import functools
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomBlock,
    BloomForCausalLM,
    BloomMLP,
    BloomModel,
)
from transformers.utils.deprecation import deprecate_kwarg

from bloomft.batch import IGNORE_INDEX
from bloomft.files import make_folder
from bloomft.model.document_bias import document_bias
from bloomft.model.fused_block import (
    FusedBloomAttention,
    FusedBloomBlock,
    FusedBloomMLP,
    FusedInputs,
    FusedLinear,
    takes_fused_inputs,
)
from bloomft.model.peft_format import adapted_layers, holds_adapters, save_peft_adapter
from bloomft.model.plain_modules import is_plain
from bloomft.model.sharded_vocabulary import gathered_blocks
from bloomft.process import release_freed_memory
from lorakernels import (
    AttentionMask,
    alibi_slopes,
    attention_mask,
    linear_cross_entropy,
    linear_cross_entropy_in_blocks,
)

# Freed memory is returned after every so many blocks: what a block frees lies between what it saves, in holes
# that glibc cannot give to aligned tensors of the same size. After every block, fresh pages would cost more.
RELEASE_EVERY = 8


class FusedBloomModel(BloomModel):
    """BLOOM's trunk, with documents packed in one row, and the fused attention where it is equivalent."""

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithPastAndCrossAttentions:
        """As `BloomModel.forward`, and ``document_ids`` [B, T]: no attention between different ids."""
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        if use_cache is None:
            use_cache = config.use_cache and not self.training and document_ids is None
        cached = use_cache or cache is not None
        if cached and document_ids is not None:
            raise ValueError("document_ids: packed rows have no key-value cache; pass use_cache=False")
        eager = output_attentions or _has_holes(attention_mask) or not all(map(takes_fused_inputs, self.h))
        # in training mode transformers itself decides what happens to a cache
        eager = eager or (cached and (self.training or not _only_grows(cache)))
        if eager and document_ids is None:
            return super().forward(
                input_ids=input_ids,
                cache=cache,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **kwargs,
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        hidden = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.word_embeddings_layernorm(hidden)
        slopes = alibi_slopes(self.num_heads, device=hidden.device)
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        alibi: Tensor | FusedInputs
        mask: Tensor | None
        if eager and document_ids is not None:  # without document_ids it has returned above
            alibi, mask = document_bias(slopes, document_ids, attention_mask, hidden.dtype)
        else:
            alibi, mask = FusedInputs(slopes, self._mask(document_ids, hidden, cache)), None

        every_hidden = [hidden]
        every_attention = []
        for index, block in enumerate(self.h):
            if index % RELEASE_EVERY == RELEASE_EVERY - 1 and _fragments(hidden):
                release_freed_memory()
            hidden, attention = block(
                hidden,
                alibi=alibi,
                attention_mask=mask,
                layer_past=cache,
                output_attentions=output_attentions,
            )
            every_hidden.append(hidden)
            every_attention.append(attention)
        hidden = self.ln_f(hidden)
        every_hidden[-1] = hidden

        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = tuple(every_hidden) if wanted else None
        attentions = tuple(every_attention) if output_attentions else None
        if not (config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in (hidden, cache, hidden_states, attentions) if value is not None)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden, cache=cache, hidden_states=hidden_states, attentions=attentions
        )

    def _mask(self, document_ids: Tensor | None, hidden: Tensor, cache: Cache | None) -> AttentionMask | None:
        """The mask for all blocks, None for tokens that follow cached ones and see them all."""
        if cache is not None and cache.get_seq_length() > 0:
            return None
        batch, length, _ = hidden.shape
        return attention_mask(document_ids, batch, length, hidden.device)


class FusedBloomForCausalLM(BloomForCausalLM):
    """BLOOM with the vocabulary loss computed from the hidden states, where that is the loss asked for.

    That is transformers' own causal loss, with ``shift_labels``, an integer ``ignore_index`` and
    ``num_items_in_batch``. Any other keyword, a user's own ``loss_function`` or ``config.loss_type``, and
    an ``lm_head`` that is not a plain projection take the path of transformers: logits, then
    ``self.loss_function``.

    In training mode with labels the logits of the fused loss are None and never exist; ``skip_logits=False``
    asks for them, ``skip_logits=True`` leaves them out in eval mode too.

    The fused loss waits for the device to learn which rows have a label. ``supervised_rows`` tells it, see
    `rows_with_labels`; the labels are not checked then.
    """

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        skip_logits: bool | None = None,
        supervised_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | CausalLMOutputWithCrossAttentions:
        """As `BloomForCausalLM.forward`, and ``document_ids`` [B, T]: packed documents.

        Documents do not attend to each other and a document's first label is ignored; ``shift_labels`` are
        used as they are given.
        """
        outputs = self.transformer(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            document_ids=document_ids,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        skip_logits = self.training if skip_logits is None else skip_logits
        loss = logits = None
        if labels is None or not (skip_logits and self.fuses_loss(kwargs)):
            logits = self.lm_head(hidden)
        if labels is not None:
            if document_ids is not None:
                kept = slice_logits_to_keep(document_ids[..., None], logits_to_keep)[..., 0]
                labels = ignore_first_labels(labels, kept, kwargs.get("ignore_index", IGNORE_INDEX))
            if logits is None:
                loss = self._loss_from_hidden(hidden, labels, supervised_rows, **kwargs)
            else:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)

        result = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

    def save_pretrained(  # type: ignore[override]  # the options of every version of transformers, by name
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the adapters of a patched model in PEFT's format; without adapters, what transformers writes.

        ``PeftModel.from_pretrained(base, save_directory)`` loads them, and with peft installed
        ``from_pretrained(save_directory)`` too, on the base that the model was loaded from. Raises ValueError
        for options of `PreTrainedModel.save_pretrained` that do not apply to adapters, `UserError` where
        ``save_directory`` cannot be written.
        """
        if not adapted_layers(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **options)
            return
        if state_dict is not None and holds_adapters(self, state_dict):
            state_dict = None  # Trainer hands over the state of the model that it has compiled
        asked = {"state_dict": state_dict, "push_to_hub": push_to_hub, **options}
        about_shards = {"max_shard_size", "save_peft_format", "save_original_format", "token"}
        if refused := [name for name in asked.keys() - about_shards if asked[name]]:
            raise ValueError(
                f"{min(refused)}: the adapters of a patched model are saved without it; push them with "
                "model.push_to_hub(...), or save a whole model after unpatch_bloom(model, merge=True)"
            )
        if is_main_process:
            make_folder(Path(save_directory))
            save_peft_adapter(self, Path(save_directory), self.name_or_path)

    def fuses_loss(self, options: dict[str, Any]) -> bool:
        """Whether the loss with these keywords, ``options``, is that of transformers made without logits."""
        head = self.lm_head
        return (
            self.loss_function is ForCausalLMLoss
            and options.keys() <= {"num_items_in_batch", "ignore_index", "shift_labels"}
            and isinstance(options.get("ignore_index", IGNORE_INDEX), int)
            and is_plain(head, FusedLinear)
            and head.bias is None
        )

    def _loss_from_hidden(
        self,
        hidden: Tensor,
        labels: Tensor,
        supervised_rows: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        reduction = "mean" if num_items_in_batch is None else "sum"
        rows, shift_labels = hidden.reshape(-1, hidden.shape[-1]), shift_labels.flatten().to(hidden.device)
        weight: Tensor = self.lm_head.weight
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "rows": supervised_rows,
        }
        if isinstance(weight, DTensor):
            loss = linear_cross_entropy_in_blocks(rows, gathered_blocks(weight), shift_labels, **options)
        else:
            loss = linear_cross_entropy(rows, weight, shift_labels, **options)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


# transformers looks the class up by this name, and writes it to the files that it saves.
FusedBloomForCausalLM.__name__ = BloomForCausalLM.__name__


def checkpoint_blocks(model: BloomForCausalLM, mode: bool | str, *, preserve_rng_state: bool = True) -> None:
    """Recompute blocks in the backward pass, to save memory; for training with a patched model.

    True saves each block's input alone. "selective" recomputes what follows attention and keeps the rest: the
    block's input, queries, keys and values, and what attention returns. False saves everything.
    ``preserve_rng_state`` is needed where a block draws random numbers, and cannot be captured in a CUDA
    graph.
    """
    if mode is True:
        options = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
        model.activation_checkpointing_enable(options)
    else:
        model.activation_checkpointing_disable()
    run = None
    if mode == "selective":
        run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)
    for block in model.transformer.h:
        cast(FusedBloomBlock, block).checkpoint = run


def ignore_first_labels(labels: Tensor, document_ids: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """labels [B, T] with ``ignore_index`` where a document of document_ids [B, T] begins after another."""
    begins = document_ids[..., 1:] != document_ids[..., :-1]
    begins = nn.functional.pad(begins, (1, 0), value=False).to(labels.device)
    return labels.masked_fill(begins, ignore_index)


def rows_with_labels(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The ``supervised_rows`` of a batch: int64 [n], ascending indices into its B·T rows of hidden states.

    labels [B, T] and document_ids [B, T] are those that the model is given, on the CPU for a result without
    waiting: a row counts where the token after it has a label and is of the same document.
    """
    if document_ids is not None:
        labels = ignore_first_labels(labels, document_ids)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return (shifted != IGNORE_INDEX).flatten().nonzero()[:, 0]


FUSED_CLASSES = {
    BloomForCausalLM: FusedBloomForCausalLM,
    BloomModel: FusedBloomModel,
    BloomBlock: FusedBloomBlock,
    BloomAttention: FusedBloomAttention,
    BloomMLP: FusedBloomMLP,
    nn.Linear: FusedLinear,
}


def _fragments(hidden: Tensor) -> bool:
    """Whether this forward pass leaves free memory between what it saves for the backward pass."""
    return hidden.is_cpu and torch.is_grad_enabled() and not is_compiling()


def _only_grows(cache: Cache | None) -> bool:
    """Whether cache does not exist yet, or holds the keys seen so far: not static, sliding or quantized."""
    return cache is None or (
        type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    )


def _has_holes(attention_mask: Tensor | None) -> bool:
    if attention_mask is None:
        return False
    return not (
        isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and bool(attention_mask.all())
    )
