"""The process's settings."""

import sys

import pytest
import torch

from benchmarks import process_memory
from bloomft.process import release_freed_memory, setup_process


def freed_blocks_still_resident() -> tuple[int, int]:
    """Bytes of freed blocks that glibc keeps between used ones, and what is left of them after a release."""
    setup_process()
    before = process_memory.resident()
    blocks = [torch.ones(2**18) for _ in range(128)]  # 1 MiB each
    used = blocks[1::2]
    del blocks
    kept = process_memory.resident() - before - sum(block.nbytes for block in used)
    release_freed_memory()
    return kept, process_memory.resident() - before - sum(block.nbytes for block in used)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_goes_back():
    kept, left = process_memory.in_fresh_process(freed_blocks_still_resident)
    assert kept > 48 * 2**20
    assert left < 16 * 2**20
