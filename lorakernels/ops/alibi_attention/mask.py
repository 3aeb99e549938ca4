"""Which tokens attend to which: causal within documents, as index tensors made once a batch for all layers.

The tensors come from an opaque operator, so that eager code, compiled blocks and a compiled whole model run
the same kernels on them: inductor, given the plain operations, would lay the result out anew, and
FlexAttention's kernels would read the first row's blocks for every row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class AttentionMask(NamedTuple):
    """What `attention_mask` returns, for `alibi_attention(..., mask=)`; R is the batch, or 1 for all rows
    alike.

    starts [R, T] int64 is the index of the first token of every token's document. The others list, for n =
    ceil(T / 128) blocks of tokens, how many blocks [R, 1, n] each block meets and which [R, 1, n, n], all
    int32 and contiguous: of keys for each block of queries (kv), and of queries for each block of keys (q),
    those partly visible and those wholly (full).
    """

    starts: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def attention_mask(
    document_ids: Tensor | None, batch: int, length: int, device: torch.device | str
) -> AttentionMask:
    """The mask of causal attention over `batch` rows of `length` tokens, within documents where ids are
    given.

    document_ids [batch, length], integers: a change of id along a row starts a new document. No [T, T]
    tensor is made. Raises ValueError for a shape or a device that does not fit, TypeError for ids that are
    not integers.
    """
    device = torch.device(device)
    if document_ids is not None:
        if list(document_ids.shape) != [batch, length]:
            raise ValueError(
                f"document_ids: expected shape {[batch, length]}, got {list(document_ids.shape)}"
            )
        if document_ids.is_floating_point() or document_ids.is_complex():
            raise TypeError(f"document_ids: expected integers, got {document_ids.dtype}")
        given = document_ids.device
        if given.type != device.type or device.index not in (None, given.index):
            raise ValueError(f"document_ids: expected device {device}, got {given}")
        device = given
    return AttentionMask(*_mask(document_ids, length, device))


def document_starts(document_ids: Tensor) -> Tensor:
    """Index of the first token of every token's document: [B, T] int64 from contiguous ids [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


@torch.library.custom_op("lorakernels::attention_mask", mutates_args=())
def _mask(
    document_ids: Tensor | None, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`AttentionMask`'s tensors.

    Starts never fall along a row, so the first and the last query of a block say which blocks of keys it
    sees: those from the first query's start to the block itself, and wholly those before it that begin no
    earlier than the last query's start. A block that reaches beyond the end is not wholly visible.
    """
    if document_ids is None:
        starts = torch.zeros(1, length, dtype=torch.int64, device=device)
    else:
        starts = document_starts(document_ids)
    blocks = -(-length // BLOCK)
    index = torch.arange(blocks, device=device)
    first_start = starts[:, index * BLOCK, None]  # [R, n, 1]
    last_start = starts[:, (index * BLOCK + BLOCK - 1).clamp(max=length - 1), None]
    visible = (index >= first_start // BLOCK) & (index <= index[:, None])  # [R, query blocks, key blocks]
    complete = (index[:, None] + 1) * BLOCK <= length
    whole = (index * BLOCK >= last_start) & (index < index[:, None]) & complete
    part = visible & ~whole
    return starts, *_listed(part), *_listed(whole), *_listed(part.mT), *_listed(whole.mT)


@_mask.register_fake
def _(document_ids, length, device):
    rows = 1 if document_ids is None else document_ids.shape[0]
    blocks = -(-length // BLOCK)
    counts = torch.empty(rows, 1, blocks, dtype=torch.int32, device=device)
    numbers = torch.empty(rows, 1, blocks, blocks, dtype=torch.int32, device=device)
    starts = torch.empty(rows, length, dtype=torch.int64, device=device)
    pairs = [(torch.empty_like(counts), torch.empty_like(numbers)) for _ in range(4)]
    return starts, *(tensor for pair in pairs for tensor in pair)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns each row of chosen [R, n, n] has [R, 1, n], and their numbers first [R, 1, n, n]."""
    numbers = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None].contiguous(), numbers.int()[:, None].contiguous()
