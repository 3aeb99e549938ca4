"""The vocabulary matrix, embedding and head in one, spread by rows over the processes of a run.

It is the largest matrix of a small BLOOM and is never whole: the embedding asks the owners for the rows of
its tokens, and the loss takes the matrix in blocks, each sent by its owner while the one before is used.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Two are in memory at a time. Large enough for the full bandwidth of a network.
BLOCK_BYTES = 16 * 2**20


class ShardedEmbedding(nn.Embedding):
    """An embedding whose frozen weight [V, H] is a `DTensor` sharded by rows.

    Every process has to call it as often as the others, each with ids of its own.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """ids, integers of any shape, to their rows [..., H]; waits for the device once."""
        weight = self.weight
        assert isinstance(weight, DTensor)
        local, group = weight.to_local(), weight.device_mesh.get_group()
        rows = rows_of_a_shard(len(weight), group.size())
        flat = ids.flatten()
        by_owner = flat.argsort(stable=True)
        asked = torch.bincount(flat // rows, minlength=group.size())
        answered = torch.empty_like(asked)
        dist.all_to_all_single(answered, asked, group=group)
        asks, answers = asked.tolist(), answered.tolist()
        theirs = flat.new_empty(sum(answers))
        dist.all_to_all_single(theirs, flat[by_owner], answers, asks, group=group)
        found = local[theirs - group.rank() * rows]
        received = local.new_empty(len(flat), local.shape[1])
        # as bytes, since gloo does not know every dtype
        dist.all_to_all_single(_bytes(received), _bytes(found), asks, answers, group=group)
        result = torch.empty_like(received)
        result[by_owner] = received
        return result.view(*ids.shape, local.shape[1])


def rows_of_a_shard(rows: int, processes: int) -> int:
    """How many rows of a sharded tensor a process has at most; the last ones may have fewer."""
    return -(-rows // processes)


def gathered_blocks(weight: DTensor) -> Iterator[Tensor]:
    """The rows of a matrix [V, H] that is sharded by rows, in order, in blocks of about `BLOCK_BYTES`.

    The same blocks on every process. A block is overwritten once the next but one is taken.
    """
    local, group = weight.to_local(), weight.device_mesh.get_group()
    rows = rows_of_a_shard(len(weight), group.size())
    size = max(1, BLOCK_BYTES // (weight.shape[1] * weight.element_size()))
    spans = [
        (owner, first, min(first + size, (owner + 1) * rows, len(weight)))
        for owner in range(group.size())
        for first in range(owner * rows, min((owner + 1) * rows, len(weight)), size)
    ]
    buffers = [local.new_empty(min(size, rows), local.shape[1]) for _ in range(2)]

    def send(number: int) -> tuple[Tensor, dist.Work]:
        owner, first, last = spans[number]
        block = buffers[number % 2][: last - first]
        if owner == group.rank():
            block = local[first - owner * rows : last - owner * rows]
        work = dist.broadcast(_bytes(block), group=group, group_src=owner, async_op=True)
        assert work is not None
        return block, work

    following = send(0)
    for number in range(1, len(spans) + 1):
        block, work = following
        work.wait()
        if number < len(spans):
            following = send(number)
        yield block


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
