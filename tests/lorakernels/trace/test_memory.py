"""The memory that a trace computes: storages counted once each, for as long as anything holds them."""

import pytest
import torch

from lorakernels.trace.memory import LiveMemory


@pytest.fixture
def memory():
    return LiveMemory()


def seen(memory, tensor):
    memory.see(tensor)
    return tensor


def test_a_storage_counts_from_its_birth_to_its_death(memory):
    first = seen(memory, torch.empty(100, device="meta"))
    second = seen(memory, torch.empty(50, dtype=torch.bfloat16, device="meta"))
    assert memory.live == memory.peak == 500
    del first
    assert (memory.live, memory.peak) == (100, 500)
    memory.restart()
    assert memory.peak == 100
    third = seen(memory, torch.empty(10, device="meta"))
    assert (memory.live, memory.peak) == (140, 140)
    del second, third
    assert (memory.live, memory.peak) == (0, 140)


def test_views_share_what_they_are_views_of(memory):
    whole = seen(memory, torch.empty(4, 25, device="meta"))
    part = seen(memory, whole[1])
    seen(memory, whole)
    assert memory.live == 400
    del whole
    assert memory.live == 400
    del part
    assert memory.live == 0


def test_what_autograd_saves_is_held_until_the_backward_pass(memory):
    weight = torch.empty(100, device="meta", requires_grad=True)
    x = seen(memory, torch.empty(100, device="meta"))
    y = (x * weight).sum()
    del x
    assert memory.live == 400
    y.backward()
    assert memory.live == 0


def test_a_storage_that_grows_counts_as_it_is(memory):
    tensor = seen(memory, torch.empty(10, device="meta"))
    tensor.resize_(30)
    seen(memory, tensor)
    assert memory.live == memory.peak == 120
    del tensor
    assert memory.live == 0
