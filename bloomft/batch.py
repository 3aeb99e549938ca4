"""The batch that the data pipeline makes and the model takes: three tensors [B, T].

input_ids int64; labels int64, the input ids unshifted, `IGNORE_INDEX` where there is no label;
document_ids int32, which count 0, 1, 2... in a row and are `PADDING_ID` on its padding.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
PADDING_ID = -1  # padding is a separate document, which attends to no real token

Batch = dict[str, Tensor]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``, without waiting for the copies."""
    return {name: pinned(tensor, device).to(device, non_blocking=True) for name, tensor in batch.items()}


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` in memory that a copy to ``device`` reads by itself; on a CPU ``tensor``.

    torch hands out such memory again once the copies from it are done.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor
