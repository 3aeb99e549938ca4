"""Rows of an embedding that its owners send, and the blocks that every process sees."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bloomft.model import sharded_vocabulary
from bloomft.model.sharded_vocabulary import ShardedEmbedding, gathered_blocks, rows_of_a_shard
from tests.bloomft.launched import run_together

WIDTH = 6


def sharded(whole: torch.Tensor) -> DTensor:
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = rows_of_a_shard(len(whole), size)
    local = whole[rank * rows : (rank + 1) * rows].clone()
    mesh = init_device_mesh("cpu", (size,))
    placed = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **placed)


def matrix(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def look_up(rows: int, dtype: torch.dtype) -> None:
    whole, rank = matrix(rows, dtype), dist.get_rank()
    embedding = nn.Embedding(rows, WIDTH, device="meta")
    embedding.__class__ = ShardedEmbedding
    embedding.weight = nn.Parameter(sharded(whole), requires_grad=False)
    generator = torch.Generator().manual_seed(rank)
    # of other lengths on every process, none at all on the last one
    shape = (2, 0 if rank == dist.get_world_size() - 1 else 3 + 4 * rank)
    for kind in (torch.int64, torch.int32):
        ids = torch.randint(rows, shape, generator=generator).to(kind)
        found = embedding(ids)
        assert found.dtype == dtype
        assert torch.equal(found, whole[ids.long()])


@pytest.mark.parametrize(
    ("size", "rows", "dtype"), [(2, 9, torch.float32), (3, 7, torch.bfloat16), (3, 4, torch.float16)]
)
def test_each_process_gets_the_rows_of_its_tokens(size, rows, dtype):
    assert run_together(size, functools.partial(look_up, rows, dtype)) == [0] * size


def walk(rows: int, dtype: torch.dtype, in_block: int) -> None:
    sharded_vocabulary.BLOCK_BYTES = in_block * WIDTH * dtype.itemsize
    whole, first = matrix(rows, dtype), 0
    for block in gathered_blocks(sharded(whole)):
        assert 1 <= len(block) <= in_block
        assert torch.equal(block, whole[first : first + len(block)])
        first += len(block)
    assert first == rows


@pytest.mark.parametrize(
    ("size", "rows", "dtype", "in_block"),
    [
        (2, 20, torch.float32, 3),
        (3, 7, torch.bfloat16, 100),
        (4, 5, torch.float16, 1),
        (1, 6, torch.float64, 4),
    ],
)
def test_blocks_are_the_matrix_in_order(size, rows, dtype, in_block):
    assert run_together(size, functools.partial(walk, rows, dtype, in_block)) == [0] * size
